"""Records of JSON, JSON lines, CSV and TSV: every good one arrives, every bad one is told."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingest_files import read, read_one, stamp_of, write

from polyhead.search.ingest import ReadError, ReadProblem, read_documents

TEA = {
    "_id": "t1",
    "title": "Tea",
    "text": "Green tea.",
    "year": 1990,
    "good": True,
    "price": 2.5,
    "none": None,
    "e": "",
}
TEA_NESTED = {**TEA, "meta": {"lang": "en", "deep": {"x": 1}}, "tags": ["hot", "wet"], "vector": [0.1] * 100, "o": [{}]}
ATTRIBUTES = {"_id": "t1", "year": 1990, "good": True, "price": 2.5}


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_a_json_list_an_object_and_json_lines_agree(tmp_path: Path) -> None:
    for name, content in [("a.json", json.dumps([TEA_NESTED])), ("b.json", json.dumps(TEA_NESTED))] + [
        (f"c.{suffix}", lines(TEA_NESTED)) for suffix in ("jsonl", "ndjson")
    ]:
        document = read_one(write(tmp_path, name, content))
        assert (document.id, document.title, document.text) == (f"{name}::t1", "Tea", "Green tea.")
        assert document.attributes == {**ATTRIBUTES, "meta.lang": "en", "meta.deep.x": 1, "tags": "hot, wet"}


@pytest.mark.parametrize("name", ["a.json.gz", "a.jsonl.gz", "a.csv.gz", "a.tsv.gz"])
def test_gzipped_data_files(tmp_path: Path, name: str) -> None:
    content = {"json": json.dumps([TEA]), "jsonl": lines(TEA), "csv": "title,text\nTea,Green tea.\n"}
    content["tsv"] = content["csv"].replace(",", "\t")
    packed = gzip.compress(content[name.split(".")[1]].encode())
    document = read_one(write(tmp_path, name, packed))
    assert (document.title, document.text, document.kind) == ("Tea", "Green tea.", name.split(".")[1])
    with pytest.raises(ReadError, match="gzip"):
        list(read_documents(write(tmp_path, name, b"no gzip at all")))


def test_a_truncated_gzip_gives_what_stands_before_the_break(tmp_path: Path) -> None:
    texts = [f"text {i} {i * i * 7919 % 65537}" for i in range(5000)]
    jsonl = gzip.compress(lines(*({"text": text} for text in texts)).encode())
    table = gzip.compress("\n".join(["text", *texts]).encode())
    for name, packed in [("a.jsonl.gz", jsonl), ("a.csv.gz", table)]:
        documents, problems = read(write(tmp_path, name, packed[: len(packed) // 2]))
        assert 500 < len(documents) < 4500
        assert [one.text for one in documents] == texts[: len(documents)]
        assert problems[-1].lost
        assert "damaged from here on" in problems[-1].reason
        assert problems[-1].line is not None
        with pytest.raises(ReadError, match="damaged from here on"):
            list(read_documents(stamp_of(tmp_path / name)))
    with pytest.raises(ReadError, match="gzip"):
        list(read_documents(write(tmp_path, "a.json.gz", gzip.compress(b'[{"text": "x"}]' * 99)[:-12]), problems=[]))


def test_a_bad_line_is_told_with_its_number_and_loses_no_other(tmp_path: Path) -> None:
    good = [{"text": f"naïve {i}"} for i in range(30)]
    raw = [json.dumps(one, ensure_ascii=False).encode() for one in good]
    raw[16] = b'{"text": "cut off'
    raw[17] = b'{"text": "caf\xe9"}'
    raw[18] = b"[1, 2]"
    raw[19] = b'{"text": {"a": 1}}'
    raw[20] = b'{"text": " "}'
    raw[21] = b'{"words": 1, "other": 2}'
    raw[22] = b""
    raw[23] = b"[" * 100_000
    stamp = write(tmp_path, "a.jsonl", b"\n".join(raw))
    documents, problems = read(stamp)
    assert [one.id for one in documents] == [f"a.jsonl#{i}" for i in range(1, 31) if not 17 <= i <= 24]
    assert [one.text for one in documents] == [one["text"] for i, one in enumerate(good, 1) if not 17 <= i <= 24]
    assert [(one.line, one.lost) for one in problems] == [(i, True) for i in (17, 18, 19, 20, 21, 22, 24)]
    said = [one.reason for one in problems]
    for words, reason in zip(
        ["no valid JSON", "UTF-8 at byte 14", "a list", "an object", "is empty", "'words', 'other'", "nested"],
        said,
        strict=True,
    ):
        assert words in reason
    assert str(problems[0]).startswith("a.jsonl, line 17: ")
    with pytest.raises(ReadError, match=r"a\.jsonl: line 17: no valid JSON"):
        list(read_documents(stamp))


def test_json_lines_in_other_encodings(tmp_path: Path) -> None:
    content = '{"text": "naïve café"}\n{"text": "déjà vu"}\n'
    for encoding in ("utf-8-sig", "utf-16", "latin-1"):
        documents, problems = read(write(tmp_path, f"{encoding}.jsonl", content.encode(encoding)))
        assert [one.text for one in documents] == ["naïve café", "déjà vu"]
        assert [one.lost for one in problems] == ([False] if encoding == "latin-1" else [])


def test_text_fields(tmp_path: Path) -> None:
    def of(record: Any, text_field: str = "text") -> tuple[str, str | None, dict[str, Any]]:
        (document,), _ = read(write(tmp_path, "a.json", json.dumps(record)), text_field)
        return document.text, document.title, document.attributes

    assert of({"Text": "x", "TITLE": "T"}) == ("x", "T", {})
    assert of({"abstract": "long", "body": "", "content": "c"}) == ("c", None, {"abstract": "long"})
    assert of({"title": "Only a title"}) == ("Only a title", "Only a title", {})
    assert of({"title": "T", "text": ""}) == ("T", "T", {})
    assert of({"q": "x", "text": "other"}, "q") == ("x", None, {"text": "other"})
    assert of({"text": ["a", "b"]}) == ("a\n\nb", None, {})
    assert of({"text": 5}) == ("5", None, {})
    assert of(["plain strings", "two"][:1]) == ("plain strings", None, {})
    assert of({"text": "half \ud83d surrogate"}) == ("half \ufffd surrogate", None, {})
    with pytest.raises(ReadError, match=r"no text field 'q'; fields found: 'body', 'n'"):
        read(write(tmp_path, "a.json", '{"body": "b", "n": 1}'), "q")


def test_ids_stay_unique(tmp_path: Path) -> None:
    records = [
        {"id": 1, "text": "a"},
        {"id": "1", "text": "b"},
        {"text": "c"},
        {"id": "1~2", "text": "d"},
        {"id": "", "text": "e"},
    ]
    documents, problems = read(write(tmp_path, "a.json", json.dumps(records)))
    assert [one.id for one in documents] == ["a.json::1", "a.json::1~2", "a.json#3", "a.json::1~2~2", "a.json#5"]
    assert [one.lost for one in problems] == [False, False]
    assert "'1' was used before" in problems[0].reason


def test_a_file_without_any_usable_record_is_an_error_told_once(tmp_path: Path) -> None:
    stamp = write(tmp_path, "a.jsonl", lines(*({"words": i} for i in range(50))))
    problems = [ReadProblem("other.jsonl", "kept")]
    with pytest.raises(ReadError, match=r"none of 50 records .* line 1: no text field 'text'; fields found: 'words'"):
        list(read_documents(stamp, problems=problems))
    assert [one.path for one in problems] == ["other.jsonl"]
    long = write(tmp_path, "b.jsonl", lines(*({"words": i} for i in range(5000))))
    with pytest.raises(ReadError, match="none of 1,000 records read so far"):
        list(read_documents(long, problems=problems))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": "b"}', r"Extra data.*JSON lines\? Then name it \.jsonl"),
        ('[{"text": "a"', "no valid JSON"),
        ("[" * 200_000, "nested too deeply"),
        ("17", "a number, expected an object"),
    ],
)
def test_damaged_json(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ReadError, match=message):
        list(read_documents(write(tmp_path, "a.json", content)))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_delimiters_quotes_and_types(tmp_path: Path, delimiter: str) -> None:
    rows = [
        ["id", "Text", "stars", "zip", "price", "", "stars"],
        ["a", 'He said "no",\nthen; left|\t.', "5", "01234", "2.50", "x", "-3"],
        ["b", "Plain", "", "0", "1e5", "", "12345678901234567890"],
    ]
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows(rows)
    first, second = read(write(tmp_path, "a.csv", "\n" + out.getvalue()))[0]
    assert (first.id, first.text) == ("a.csv::a", rows[1][1])
    assert first.attributes == {"id": "a", "stars": 5, "zip": "01234", "price": 2.5, "column6": "x", "stars.2": -3}
    assert second.attributes == {"id": "b", "zip": 0, "price": "1e5", "stars.2": "12345678901234567890"}


def test_numbers_in_the_text_column_stay_as_written(tmp_path: Path) -> None:
    documents, _ = read(write(tmp_path, "a.csv", "text,title\n2.50,007\n1.0,x\n"))
    assert [(one.text, one.title) for one in documents] == [("2.50", "007"), ("1.0", "x")]


def test_tsv_with_meaningless_quotes(tmp_path: Path) -> None:
    body = 'text\tlabel\n"Open quote\t1\nnext\t2\n5" pipe\t3\nlast"\t4\n'
    documents, problems = read(write(tmp_path, "a.tsv", body))
    assert [one.text for one in documents] == ['"Open quote', "next", '5" pipe', 'last"']
    assert problems == []
    quoted, _ = read(write(tmp_path, "b.tsv", 'text\tlabel\n"two\nlines, ""so"""\t1\nx\t2\n'))
    assert [one.text for one in quoted] == ['two\nlines, "so"', "x"]
    plain, _ = read(write(tmp_path, "c.tsv", '"text"\t"label"\n"one"\t"1"\n'))
    assert [(one.text, one.attributes) for one in plain] == [("one", {"label": 1})]


def test_rows_that_do_not_fit_the_header_are_told(tmp_path: Path) -> None:
    body = "text,label\nright,1\ntoo,many,2\nfew\n\n,3\nright again,4\n"
    documents, problems = read(write(tmp_path, "a.csv", body))
    assert [(one.id, one.text) for one in documents] == [("a.csv#1", "right"), ("a.csv#5", "right again")]
    assert [(one.line, one.reason) for one in problems] == [
        (3, "row 2 has 3 fields, the header names 2"),
        (4, "row 3 has 1 fields, the header names 2"),
        (6, "field 'text' is empty"),
    ]


def test_a_quote_left_open_is_suspected(tmp_path: Path) -> None:
    body = "label,text\n" + "1,fine\n" * 3 + '1,"open\n' + "1,swallowed\n" * 600
    documents, (problem,) = read(write(tmp_path, "a.csv", body))
    assert len(documents) == 4
    assert "quote left open" in problem.reason
    assert problem.line == 5


def test_a_table_without_header_names_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"no column 'text'.*'3', 'Fears for pension'.*text_field"):
        list(read_documents(write(tmp_path, "a.csv", '"3","Fears for pension"\n"4","Race"\n')))
    assert read(write(tmp_path, "b.csv", "text,label\n")) == ([], [])
    assert read_one(write(tmp_path, "c.csv", "text\none column, with a comma\n".replace(", ", " "))).text


def test_long_fields_and_other_encodings_of_tables(tmp_path: Path) -> None:
    assert len(read_one(write(tmp_path, "a.csv", f"text,n\n{'x' * 500_000},1\n")).text) == 500_000
    (document,), (problem,) = read(write(tmp_path, "b.csv", "text;n\nnaïve café;1\n".encode("latin-1")))
    assert (document.text, document.attributes, problem.lost) == ("naïve café", {"n": 1}, False)
    assert read_one(write(tmp_path, "c.csv", "text;n\r\nnaïve;1\r\n".encode("utf-16"))).text == "naïve"
    _, (damaged,) = read(write(tmp_path, "d.csv", "text,n\ndéjà vu ".encode() + b"\xff,1\n"))
    assert (damaged.line, damaged.lost) == (2, False)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip), st.integers()),
        min_size=1,
        max_size=8,
    )
)
def test_what_csv_and_json_write_is_what_is_read(tmp_path: Path, rows: list[tuple[str, int]]) -> None:
    out = io.StringIO()
    csv.writer(out).writerows([("text", "label"), *rows])
    content = lines(*({"text": text, "label": label} for text, label in rows))
    for name, written in [("a.csv", out.getvalue()), ("a.jsonl", content)]:
        documents, problems = read(write(tmp_path, name, written))
        assert [one.text for one in documents] == [text for text, _ in rows]
        assert [int(one.attributes["label"]) for one in documents] == [label for _, label in rows]
        assert problems == []


def test_real_articles(data_dir: Path) -> None:
    documents, problems = read(stamp_of(data_dir / "mrag-wikipedia" / "articles.json.gz"))
    assert (len(documents), problems) == (1250, [])
    assert len({one.attributes["label"] for one in documents}) == 25
    intents, problems = read(stamp_of(data_dir / "banking77" / "train.csv"))
    assert (len(intents), problems) == (10003, [])
