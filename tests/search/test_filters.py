"""The filter language: what it refuses, and how it says so. What passes is tested on real tables in test_store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyhead.errors import InputError
from polyhead.search.filters import COLUMNS, compile_filter


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("knd = 'pdf'", "no column 'knd', did you mean 'kind'"),
        ("author = 'x'", "attributes.NAME"),
        ('kind = "pdf"', "single quotes"),
        ("kind = pdf", "single quotes"),
        ("size = '1000'", "expected a number"),
        ("size > 1e30", "larger than any number"),
        ("modified > '0001-01-01T00:00:00+10:00'", "no time"),
        ("kind = 5", "expected a text"),
        ("size like '1%'", "LIKE needs a column of text"),
        ("modified > 'yesterday'", "no time"),
        ("modified > 2026", "expected a time"),
        ("(kind = 'pdf'", r"expected '\)'"),
        ("kind = 'pdf' or", "expected a column name"),
        ("kind = 'pdf'; drop table chunks", "cannot read this"),
        ("kind = 'pdf", "cannot read this"),
        ("kind 'pdf'", "expected =, !="),
        ("kind in 'pdf'", r"expected '\(' after IN"),
        ("kind is 'pdf'", "expected NULL"),
        ("size between 1 or 2", "expected AND between"),
        ("kind = 'a' kind = 'b'", "expected AND, OR or the end"),
        ("not " * 100 + "kind = 'a'", "nested deeper"),
        ("kind = '" + "x" * 30_000 + "'", "at most 20,000"),
    ],
)
def test_what_cannot_be_used_is_explained(where: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        compile_filter(where)


def test_an_unknown_column_lists_all_columns() -> None:
    with pytest.raises(InputError) as caught:
        compile_filter("nope = 1")
    assert all(column in str(caught.value) for column in COLUMNS)


@pytest.mark.parametrize("nothing", [None, "", "  \n"])
def test_no_filter(nothing: str | None) -> None:
    assert compile_filter(nothing) is None


@given(st.text(max_size=40))
def test_any_text_is_either_refused_or_safe(text: str) -> None:
    try:
        sql = compile_filter(text)
    except InputError:
        return
    assert sql is None or any(f"`{column}`" in sql for column in COLUMNS) or "attributes" in sql


@given(st.text(max_size=60))
def test_a_text_stays_one_literal(value: str) -> None:
    quoted = "'" + value.replace("'", "''") + "'"
    assert compile_filter(f"kind = {quoted}") == f"(`kind` = {quoted})"
