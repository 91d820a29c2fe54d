"""Data sets: the real ones where they are, formats and errors from small files."""

from __future__ import annotations

import bz2
import gzip
import json

import pytest

from polyhead.data import data_folder, load_sts
from polyhead.errors import DataNotFoundError, InputError
from polyhead.evaluate import datasets
from polyhead.evaluate.datasets import load_retrieval


@pytest.fixture
def real(data_dir, monkeypatch):
    monkeypatch.setenv("POLYHEAD_DATA", str(data_dir))


@pytest.mark.parametrize(
    ("name", "documents", "queries", "relevant"),
    [("mrag-wikipedia", 1250, 250, 2275), ("cranfield", 1400, 225, 1612), ("limit-small", 46, 1000, 2000)],
)
def test_real_data_counts(real, name, documents, queries, relevant):
    data = load_retrieval(name)
    assert (len(data.corpus), len(data.queries)) == (documents, queries)
    assert sum(grade > 0 for judged in data.qrels.values() for grade in judged.values()) == relevant
    assert all(document in data.corpus for judged in data.qrels.values() for document in judged)


def test_cranfield_judgements_count_questions_by_position(real):
    """The words a question shares with its judged documents tell the right numbering from the wrong one."""
    data = load_retrieval("cranfield")

    def overlap(shift: int) -> float:
        ids = list(data.queries)
        total = 0.0
        for place, query in enumerate(ids):
            words = {word for word in data.queries[ids[(place + shift) % len(ids)]].split() if len(word) > 4}
            judged = [d for d, grade in data.qrels[query].items() if grade > 0]
            total += sum(len(words & set(data.corpus[d].split())) / max(1, len(words)) for d in judged) / len(judged)
        return total / len(ids)

    assert overlap(0) > 2 * overlap(5)


def test_mrag_aspects(real):
    data = load_retrieval("mrag-wikipedia")
    assert sorted(set(data.groups["aspects"].values())) == [1, 2, 3, 4, 5, 6, 10, 15, 20, 25]
    assert all(len(data.qrels[q]) == n for q, n in data.groups["aspects"].items())


def beir(folder, qrels="query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td1\t0\n"):
    (folder / "qrels").mkdir()
    rows = [{"_id": "d1", "title": "T", "text": "body"}, {"_id": "d2", "text": "only"}]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "queries.jsonl").write_text('{"_id": "q1", "text": "one"}\n{"_id": "q2", "text": "two"}\n')
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return str(folder)


def test_beir_folder(tmp_path):
    data = load_retrieval(beir(tmp_path))
    assert data.corpus == {"d1": "T\nbody", "d2": "only"}
    assert data.queries == {"q1": "one"}
    assert data.card["queries_without_relevant_documents"] == 1


def test_bad_folders_say_what_is_missing(tmp_path):
    with pytest.raises(InputError, match=r"no corpus\.jsonl"):
        load_retrieval(str(tmp_path))
    with pytest.raises(InputError, match="header line"):
        load_retrieval(beir(tmp_path, qrels="q1\td1\t1\nq2\td1\t1\n"))
    (tmp_path / "queries.jsonl").write_text("{not json\n")
    with pytest.raises(InputError, match="line 1"):
        load_retrieval(str(tmp_path))
    with pytest.raises(InputError, match="No data 'nope'"):
        load_retrieval("nope")


def test_download_is_used_where_the_folder_is_missing(tmp_path, monkeypatch):
    home = tmp_path / "public"
    home.mkdir()
    (home / "a.txt").write_text("kept")
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("POLYHEAD_DATA", raising=False)
    folder = data_folder("toy", {"a.txt": (home / "a.txt").as_uri()})
    assert (folder / "a.txt").read_text() == "kept"
    assert list(folder.iterdir()) == [folder / "a.txt"]


def test_bz2_from_a_public_home_is_kept_as_gz(tmp_path, monkeypatch):
    (tmp_path / "a.json.bz2").write_bytes(bz2.compress(b'{"kept": 1}'))
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("POLYHEAD_DATA", raising=False)
    folder = data_folder("toy", {"a.json.gz": (tmp_path / "a.json.bz2").as_uri()})
    assert gzip.decompress((folder / "a.json.gz").read_bytes()) == b'{"kept": 1}'


def test_without_a_home_it_says_what_to_make(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("POLYHEAD_DATA", str(tmp_path))
    with pytest.raises(DataNotFoundError, match=r"Make sts/2015/answers-forums\.test\.tsv from its public release"):
        load_sts(2015)


def test_nowhere_to_be_found(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYHEAD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("POLYHEAD_DATA", str(tmp_path))
    source = datasets._Source({"gone.txt": (tmp_path / "gone.txt").as_uri()}, lambda folder: None)
    monkeypatch.setitem(datasets.RETRIEVAL_DATA, "toy", source)
    with pytest.raises(DataNotFoundError, match="POLYHEAD_DATA") as caught:
        load_retrieval("toy")
    assert "gone.txt" in str(caught.value)
