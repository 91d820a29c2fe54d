"""Columns of any table become rows of one kind; what is wrong with them is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyhead.data import SentencePairs
from polyhead.errors import InputError
from polyhead.training import examples

PAIR = {"anchor": "a", "positive": "b"}


@pytest.mark.parametrize(
    ("row", "kind", "columns"),
    [
        (PAIR, "pairs", ["anchor", "positive"]),
        ({"positive": "b", "anchor": "a"}, "pairs", ["anchor", "positive"]),
        ({"Question": "a", "Answer": "b"}, "pairs", ["anchor", "positive"]),
        ({"sentence1": "a", "sentence2": "b", "score": "3.5"}, "scored", ["anchor", "positive", "score"]),
        ({**PAIR, "label": 1}, "scored", ["anchor", "positive", "score"]),
        ({**PAIR, "negative": "c"}, "triplets", ["anchor", "positive", "negative_1"]),
        ({**PAIR, "negatives": ["c", "d"]}, "triplets", ["anchor", "positive", "negative_1", "negative_2"]),
        (
            {**PAIR, "negative_2": "d", "negative_1": "c"},
            "triplets",
            ["anchor", "positive", "negative_1", "negative_2"],
        ),
        ({"text": "a", "category": "x"}, "labelled", ["text", "label"]),
        ({"sentence": "a"}, "texts", ["text"]),
    ],
)
def test_kinds(row: dict[str, Any], kind: str, columns: list[str]) -> None:
    found = examples([row, row])
    assert found.kind == kind
    assert list(found.columns) == columns
    assert len(found) == 2


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no rows"),
        ([{**PAIR, "id": 3}], "'id' is none of those known"),
        ([{"positive": "b"}], "do not make a training set"),
        ([{"anchor": "a", "query": "q", "positive": "b"}], "would all be the anchor"),
        ([{**PAIR, "score": 1.0, "label": 1}], "both labels and scores"),
        ([{**PAIR, "negative": "c", "score": 1.0}], "both negatives and scores"),
        ([{**PAIR, "label": 3}], "a pair's label is 0 or 1"),
        ([PAIR, {"anchor": "a"}], "Row 1 of the list has columns"),
        ([PAIR, {"anchor": "a", "positive": None}], "Row 1 has None as positive"),
        ([{"anchor": " ", "positive": "b"}], "Row 0 has ' ' as anchor"),
        ([{**PAIR, "score": "good"}], "expected a number"),
        ([{**PAIR, "negatives": ["c"]}, {**PAIR, "negatives": ["c", "d"]}], "equally many texts"),
        ([{"text": "a", "label": None}], "Row 0 has no label"),
        (3, "was given as int"),
        ({"anchor": ["a"], "positive": []}, "differ in length"),
    ],
)
def test_what_is_wrong_is_said(rows: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        examples(rows)


def test_columns_can_be_named() -> None:
    rows = [{"q": "a", "pos": "b", "n1": "c", "n2": "d", "id": 1}]
    found = examples(rows, {"anchor": "q", "positive": "pos", "negative": ["n2", "n1"]})
    assert found.columns == {"anchor": ["a"], "positive": ["b"], "negative_1": ["d"], "negative_2": ["c"]}
    with pytest.raises(InputError, match="asks for nothing as anchor; the data has q, pos"):
        examples(rows, {"anchor": "nothing"})
    with pytest.raises(InputError, match="columns names 'who'"):
        examples(rows, {"who": "q"})


def test_files_and_other_tables(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    expected = examples([{"anchor": 'one, "two"\nthree', "positive": "four"}])
    (tmp_path / "a.csv").write_text('anchor,positive\n"one, ""two""\nthree",four\n', encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"anchor": 'one, "two"\nthree', "positive": "four"}), encoding="utf-8")
    for data in (tmp_path / "a.csv", str(tmp_path / "a.jsonl"), expected.dataset(), expected.columns, expected):
        assert examples(data) == expected
        assert examples(data).fingerprint == expected.fingerprint
    assert examples([PAIR]).fingerprint != expected.fingerprint
    scored = examples(SentencePairs("s", [("a", "b")], np.array([2.0]), ["g"]))
    assert scored.columns == {"anchor": ["a"], "positive": ["b"], "score": [2.0]}
    assert examples([{"text": "a", "label": "no"}, {"text": "b", "label": "yes"}]).classes == ["no", "yes"]
    with pytest.raises(InputError, match="choose one, such as"):
        examples(DatasetDict(train=Dataset.from_dict(expected.columns)))
    with pytest.raises(InputError, match="No file"):
        examples(tmp_path / "b.csv")
    (tmp_path / "c.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match=r"ends in '\.txt'"):
        examples(tmp_path / "c.txt")
