"""Data of the tasks on vectors: pairs with scores or labels, texts with labels, candidates to rerank."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from polyhead.data import SentencePairs, data_folder, load_sts, load_texts
from polyhead.errors import InputError
from polyhead.evaluate.datasets import RETRIEVAL_DATA, RetrievalData, load_retrieval

__all__ = [
    "LabelledTexts",
    "RerankingData",
    "candidates_of",
    "load_labelled",
    "load_pairs",
    "load_reranking",
    "read_table",
]

_BANKING = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/master/banking_data/"
_AG_TEST = 2_000
_ALIKE, _UNLIKE = 4.0, 2.0


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with one label each, a part to learn from and a part to be judged by.

    Attributes:
        train, test: texts.
        train_labels, test_labels: their labels, integers or strings.
        card: source and counts.
    """

    name: str
    train: list[str]
    train_labels: list[Any]
    test: list[str]
    test_labels: list[Any]
    card: dict[str, Any] = field(default_factory=dict)

    def limited(self, limit: int | None, seed: int = 0) -> LabelledTexts:
        """At most ``limit`` texts to be judged by, drawn at random, in their order; the card says so."""
        if limit is None or limit >= len(self.test):
            return self
        rows = np.sort(np.random.default_rng(seed).choice(len(self.test), limit, replace=False))
        test, labels = [self.test[i] for i in rows], [self.test_labels[i] for i in rows]
        card = {**self.card, "test": limit, "test_left_out": len(self.test) - limit}
        return LabelledTexts(self.name, self.train, self.train_labels, test, labels, card)


@dataclass(frozen=True)
class RerankingData:
    """Questions, each with candidates to put in order.

    Attributes:
        queries, documents: id -> text.
        candidates: query id -> document ids.
        qrels: query id -> document id -> relevance, above 0 relevant.
        card: source and counts.
    """

    name: str
    queries: dict[str, str]
    documents: dict[str, str]
    candidates: dict[str, list[str]]
    qrels: dict[str, dict[str, int]]
    card: dict[str, Any] = field(default_factory=dict)

    def limited(self, limit: int | None, seed: int = 0) -> RerankingData:
        """At most ``limit`` questions, drawn at random, in their order; the card says so."""
        if limit is None or limit >= len(self.queries):
            return self
        names = list(self.queries)
        kept = [names[i] for i in np.sort(np.random.default_rng(seed).choice(len(names), limit, replace=False))]
        candidates = {name: self.candidates[name] for name in kept}
        used = {document for some in candidates.values() for document in some}
        documents = {name: text for name, text in self.documents.items() if name in used}
        card = {**self.card, "queries": limit, "queries_left_out": len(names) - limit}
        queries = {name: self.queries[name] for name in kept}
        return RerankingData(self.name, queries, documents, candidates, {q: self.qrels[q] for q in kept}, card)


def read_table(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a ``.csv``, ``.tsv`` (with a header line) or ``.jsonl`` file.

    Raises:
        InputError: no such file, another ending, a line that is not JSON, or no rows.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"There is no data '{path}': neither a known name nor a .csv, .tsv or .jsonl file.")
    rows: list[dict[str, Any]] = []
    with file.open(encoding="utf-8", newline="") as stream:
        if file.suffix in (".csv", ".tsv"):
            rows = list(csv.DictReader(stream, delimiter="\t" if file.suffix == ".tsv" else ","))
        elif file.suffix == ".jsonl":
            for number, line in enumerate(stream, start=1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except json.JSONDecodeError as error:
                    raise InputError(f"'{path}', line {number}: not JSON ({error}).") from error
        else:
            raise InputError(f"'{path}' ends in '{file.suffix}'; expected .csv, .tsv or .jsonl.")
    if not rows:
        raise InputError(f"'{path}' holds no rows.")
    return rows


def _columns(rows: Sequence[Mapping[str, Any]], path: str, *names: str) -> list[list[Any]]:
    for number, row in enumerate(rows, start=1):
        missing = [name for name in names if row.get(name) in (None, "")]
        if missing:
            raise InputError(f"'{path}', row {number} has no {', '.join(missing)}; expected the columns {list(names)}.")
    return [[row[name] for row in rows] for name in names]


def load_pairs(name_or_file: str, *, labels: bool = False) -> SentencePairs:
    """Pairs of sentences with a score, or with a label 0 or 1.

    Args:
        name_or_file: "sts-2012" to "sts-2015", or a file with the columns ``sentence1``, ``sentence2`` and ``score``
            (``label`` where labels are asked for), and ``group`` if it has one.
        labels: of an STS set, pairs scored 4 and more are 1, those scored 2 and less 0, the others left out.

    Raises:
        InputError: neither a name nor a file, a column that is missing, a label other than 0 and 1.
    """
    if name_or_file.startswith("sts-") and name_or_file[4:].isdigit():
        found = load_sts(int(name_or_file[4:]))
        if not labels:
            return found
        rows = np.flatnonzero((found.gold >= _ALIKE) | (found.gold <= _UNLIKE))
        gold = (found.gold[rows] >= _ALIKE).astype(np.float64)
        return SentencePairs(found.name, [found.pairs[i] for i in rows], gold, [found.group[i] for i in rows])
    table = read_table(name_or_file)
    column = "label" if labels else "score"
    first, second, gold_of = _columns(table, name_or_file, "sentence1", "sentence2", column)
    try:
        gold = np.array([float(value) for value in gold_of])
    except ValueError as error:
        raise InputError(f"'{name_or_file}': the column {column} takes numbers only ({error}).") from None
    if labels and not set(gold.tolist()) <= {0.0, 1.0}:
        raise InputError(f"'{name_or_file}': labels are 0 or 1, found {sorted(set(gold.tolist()))[:5]}.")
    group = [str(row.get("group") or "") for row in table]
    pairs = [(str(a), str(b)) for a, b in zip(first, second, strict=True)]
    return SentencePairs(Path(name_or_file).stem, pairs, gold, group)


def load_labelled(name_or_file: str) -> LabelledTexts:
    """Texts with labels: "banking77" (77 intents), "ag-news" (4 topics), or a file.

    Args:
        name_or_file: a name, or a file with the columns ``text`` and ``label``, and ``split`` ("train" or "test") if
            it has one. Without it, and for ag-news, of which only one part is public here, the part to be judged by
            is drawn with a fixed seed: a quarter of a file, 2,000 of ag-news.

    Raises:
        InputError: neither a name nor a file, a column that is missing, another split, or a split without texts.
    """
    if name_or_file == "banking77":
        folder = data_folder("banking77", {f"{part}.csv": f"{_BANKING}{part}.csv" for part in ("train", "test")})
        parts = [_columns(read_table(folder / f"{part}.csv"), part, "text", "category") for part in ("train", "test")]
        (train, train_labels), (test, test_labels) = parts
        return LabelledTexts("banking77", train, train_labels, test, test_labels, _counts(train, test))
    if name_or_file == "ag-news":
        texts = load_texts("ag-news")
        with (data_folder("ag-news", {"test.csv": ""}) / "test.csv").open(encoding="utf-8", newline="") as stream:
            topics = [int(row[0]) - 1 for row in csv.reader(stream)]
        return _split("ag-news", texts, topics, _AG_TEST)
    table = read_table(name_or_file)
    texts, labels = _columns(table, name_or_file, "text", "label")
    name = Path(name_or_file).stem
    if not any(row.get("split") for row in table):
        return _split(name, texts, labels, max(1, len(texts) // 4))
    unknown = {row.get("split") for row in table} - {"train", "test"}
    if unknown:
        raise InputError(
            f"'{name_or_file}': split is 'train' or 'test' in every row, found {sorted(map(str, unknown))}."
        )
    of = {part: [i for i, row in enumerate(table) if row["split"] == part] for part in ("train", "test")}
    return _parts(name, texts, labels, of["train"], of["test"])


def _split(name: str, texts: list[str], labels: list[Any], test: int) -> LabelledTexts:
    order = np.random.default_rng(0).permutation(len(texts))
    return _parts(name, texts, labels, np.sort(order[test:]).tolist(), np.sort(order[:test]).tolist())


def _parts(name: str, texts: list[str], labels: list[Any], train: list[int], test: list[int]) -> LabelledTexts:
    if not train or not test:
        raise InputError(f"'{name}' needs texts to learn from and to be judged by, got {len(train)} and {len(test)}.")
    sides = [([texts[i] for i in rows], [labels[i] for i in rows]) for rows in (train, test)]
    return LabelledTexts(name, *sides[0], *sides[1], _counts(sides[0][0], sides[1][0]))


def _counts(train: list[str], test: list[str]) -> dict[str, Any]:
    return {"train": len(train), "test": len(test), "test_texts_also_in_train": len(set(train) & set(test))}


def load_reranking(name_or_file: str, *, candidates: int = 100, seed: int = 0) -> RerankingData:
    """Questions with candidates: from a retrieval data set, or a ``.jsonl`` file.

    Args:
        name_or_file: a name or folder of :func:`polyhead.evaluate.datasets.load_retrieval`, or a file of lines
            ``{"query": "...", "positive": ["..."], "negative": ["..."]}``. Lines without a positive or without a
            negative are left out and counted.
        candidates, seed: see :func:`candidates_of`; of retrieval data only.

    Raises:
        InputError: neither of these, or no line with both.
    """
    if name_or_file in RETRIEVAL_DATA or Path(name_or_file).expanduser().is_dir():
        return candidates_of(load_retrieval(name_or_file), candidates, seed)
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    ranked: dict[str, list[str]] = {}
    qrels: dict[str, dict[str, int]] = {}
    left = 0
    for number, row in enumerate(read_table(name_or_file)):
        sides: list[Any] = [row.get("positive"), row.get("negative")]
        if not isinstance(row.get("query"), str) or any(not isinstance(side, list) for side in sides):
            raise InputError(
                f"'{name_or_file}', row {number + 1}: expected query (a text), positive and negative (lists of texts)."
            )
        if not all(sides):
            left += 1
            continue
        query = str(number)
        queries[query] = row["query"]
        judged = {
            f"{query}-{kind}{i}": text for kind, side in zip("+-", sides, strict=True) for i, text in enumerate(side)
        }
        documents |= judged
        ranked[query] = list(judged)
        qrels[query] = {name: int(name.startswith(f"{query}-+")) for name in judged}
    if not queries:
        raise InputError(f"'{name_or_file}' has no line with a positive and a negative.")
    card = {"source": name_or_file, "queries": len(queries), "lines_without_positive_or_negative": left}
    return RerankingData(Path(name_or_file).stem, queries, documents, ranked, qrels, card)


def candidates_of(data: RetrievalData, count: int = 100, seed: int = 0) -> RerankingData:
    """Candidates of each question: its relevant documents, filled up with others drawn at random to ``count``.

    A question with more relevant documents than that keeps them all, and one other.

    Raises:
        InputError: fewer than 2 candidates asked for.
    """
    if count < 2:
        raise InputError(f"candidates = {count}; expected at least 2, a relevant document and another.")
    generator = np.random.default_rng(seed)
    names = list(data.corpus)
    chosen: dict[str, list[str]] = {}
    for query in data.queries:
        relevant = [name for name, grade in data.qrels[query].items() if grade > 0]
        others = [name for name in names if name not in set(relevant)]
        fill = min(len(others), max(1, count - len(relevant)))
        chosen[query] = sorted(relevant + [others[i] for i in generator.choice(len(others), fill, replace=False)])
    used = {name for some in chosen.values() for name in some}
    documents = {name: text for name, text in data.corpus.items() if name in used}
    qrels = {query: {name: data.qrels[query].get(name, 0) for name in some} for query, some in chosen.items()}
    card = {**data.card, "candidates": count, "candidates_drawn": "at random", "seed": seed}
    return RerankingData(data.name, dict(data.queries), documents, chosen, qrels, card)
