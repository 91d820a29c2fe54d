"""Retrieval data with known answers: found under ``POLYHEAD_DATA``, or fetched from its public home."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyhead.data import data_folder
from polyhead.errors import InputError

__all__ = ["RETRIEVAL_DATA", "RetrievalData", "load_retrieval"]


@dataclass(frozen=True)
class RetrievalData:
    """Documents, questions and which answers which.

    Attributes:
        corpus: document id -> text as it is encoded (title and text).
        queries: query id -> text; only those with at least one relevant document.
        qrels: query id -> document id -> relevance, above 0 relevant.
        groups: numbers by which results are also given apart: name -> query id -> number ("aspects").
        card: source, what relevance means, and counts, unjudged queries and empty documents among them.
    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    groups: dict[str, dict[str, int]] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source:
    files: dict[str, str]  # file name -> public address
    read: Callable[[Path], RetrievalData]


def load_retrieval(name_or_folder: str) -> RetrievalData:
    """Load a retrieval data set by name, or a folder in BEIR format.

    Args:
        name_or_folder: "mrag-wikipedia", "cranfield", "limit-small", or a folder with ``corpus.jsonl``,
            ``queries.jsonl`` and ``qrels/*.tsv`` (the test split where there are several) or ``qrels.jsonl``.

    Raises:
        DataNotFoundError: neither under ``POLYHEAD_DATA`` nor at its public home; says what was tried.
        InputError: an unknown name, or a folder that is not in the format.
    """
    if name_or_folder in RETRIEVAL_DATA:
        source = RETRIEVAL_DATA[name_or_folder]
        return source.read(data_folder(name_or_folder, source.files))
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return _read_beir(folder, folder.name)
    raise InputError(
        f"No data '{name_or_folder}': expected {', '.join(RETRIEVAL_DATA)}, or a folder in BEIR format "
        "(corpus.jsonl, queries.jsonl, qrels/test.tsv)."
    )


def _read_mrag(folder: Path) -> RetrievalData:
    with gzip.open(folder / "articles.json.gz", "rt", encoding="utf-8") as file:
        articles = json.load(file)
    with gzip.open(folder / "queries.json.gz", "rt", encoding="utf-8") as file:
        queries = json.load(file)
    # As Multi-Head RAG did, only the text is searched: with its title each article would be found by name.
    corpus = {article["title"]: article["text"] for article in articles}
    qrels = {str(number): dict.fromkeys(query["topics"], 1) for number, query in enumerate(queries)}
    return RetrievalData(
        "mrag-wikipedia",
        corpus,
        {str(number): query["text"] for number, query in enumerate(queries)},
        qrels,
        {"aspects": {str(number): len(query["topics"]) for number, query in enumerate(queries)}},
        {"source": "github.com/spcl/MRAG", "relevant": "the articles a story touches", "documents": len(corpus)},
    )


def _read_cranfield(folder: Path) -> RetrievalData:
    texts = (folder / "cran.all.1400.xml").read_text(encoding="utf-8")
    pattern = r"<docno>(.*?)</docno>.*?<text>(.*?)</text>"  # the file is a list of <doc>, not one XML document
    corpus = {number.strip(): " ".join(text.split()) for number, text in re.findall(pattern, texts, re.DOTALL)}
    questions = re.findall(r"<title>(.*?)</title>", (folder / "cran.qry.xml").read_text(encoding="utf-8"), re.DOTALL)
    # The judgements count questions by their position in the file; the <num> of a question is another number.
    queries = {str(number): " ".join(text.split()) for number, text in enumerate(questions, start=1)}
    qrels: dict[str, dict[str, int]] = {}
    unknown = 0
    for line in (folder / "cranqrel.trec.txt").read_text(encoding="utf-8").splitlines():
        query, _, document, grade = line.split()
        if document in corpus:
            qrels.setdefault(query, {})[document] = max(0, int(grade))
        else:
            unknown += 1
    source = {"source": "github.com/oussbenk/cranfield-trec-dataset", "relevant": "judged useful, binary"}
    counts = {"documents": len(corpus), "empty_documents": sum(not text for text in corpus.values())}
    card: dict[str, Any] = {**source, **counts, "judgements_of_unknown_documents": unknown}
    return _judged_only("cranfield", corpus, queries, qrels, card)


def _read_beir(folder: Path, name: str) -> RetrievalData:
    for file in ("corpus.jsonl", "queries.jsonl"):
        if not (folder / file).is_file():
            raise InputError(f"'{folder}' is not in BEIR format: it has no {file}.")
    corpus = {}
    for row in _json_lines(folder / "corpus.jsonl"):
        corpus[str(row["_id"])] = f"{row.get('title') or ''}\n{row.get('text') or ''}".strip()
    queries = {str(row["_id"]): str(row["text"]) for row in _json_lines(folder / "queries.jsonl")}
    qrels: dict[str, dict[str, int]] = {}
    for row in _judgements(folder):
        qrels.setdefault(str(row["query-id"]), {})[str(row["corpus-id"])] = int(float(row["score"]))
    return _judged_only(name, corpus, queries, qrels, {"source": str(folder), "documents": len(corpus)})


def _judgements(folder: Path) -> Iterable[dict[str, Any]]:
    if (folder / "qrels.jsonl").is_file():
        return list(_json_lines(folder / "qrels.jsonl"))
    splits = sorted((folder / "qrels").glob("*.tsv"))
    if not splits:
        raise InputError(f"'{folder}' is not in BEIR format: it has neither qrels/*.tsv nor qrels.jsonl.")
    chosen = next((split for split in splits if split.stem == "test"), splits[0])
    with chosen.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    if rows and not {"query-id", "corpus-id", "score"} <= set(rows[0]):
        raise InputError(f"'{chosen}' needs a header line 'query-id<TAB>corpus-id<TAB>score', found {list(rows[0])}.")
    return rows


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"'{path}', line {number}: not JSON ({error}).") from error


def _judged_only(
    name: str, corpus: dict[str, str], queries: dict[str, str], qrels: dict[str, dict[str, int]], card: dict[str, Any]
) -> RetrievalData:
    judged = {query: text for query, text in queries.items() if any(g > 0 for g in qrels.get(query, {}).values())}
    card = {**card, "queries_without_relevant_documents": len(queries) - len(judged)}
    return RetrievalData(name, corpus, judged, {query: qrels[query] for query in judged}, {}, card)


_GITHUB = "https://raw.githubusercontent.com"
RETRIEVAL_DATA = {
    "mrag-wikipedia": _Source(
        {
            "articles.json.gz": f"{_GITHUB}/spcl/MRAG/HEAD/datasets/wikipedia_articles_v1.json.bz2",
            "queries.json.gz": f"{_GITHUB}/spcl/MRAG/HEAD/datasets/wikipedia_queries_v1.json.bz2",
        },
        _read_mrag,
    ),
    "cranfield": _Source(
        {
            name: f"{_GITHUB}/oussbenk/cranfield-trec-dataset/HEAD/{name}"
            for name in ("cran.all.1400.xml", "cran.qry.xml", "cranqrel.trec.txt")
        },
        _read_cranfield,
    ),
    "limit-small": _Source(
        {
            name: f"{_GITHUB}/google-deepmind/limit/HEAD/data/limit-small/{name}"
            for name in ("corpus.jsonl", "queries.jsonl", "qrels.jsonl")
        },
        lambda folder: _read_beir(folder, "limit-small"),
    ),
}
