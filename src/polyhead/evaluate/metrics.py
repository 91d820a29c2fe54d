"""Ranking metrics through ir-measures, one value a query."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from polyhead.errors import InputError

__all__ = ["DEFAULT_METRICS", "Qrels", "Run", "distinct_scores", "per_query"]

Qrels = Mapping[str, Mapping[str, int]]
Run = Mapping[str, Sequence[tuple[str, float]]]

DEFAULT_METRICS = ("recall@2", "recall@10", "recall@20", "recall@100", "ndcg@10", "mrr", "map")
_NAMES = {"recall": "R", "ndcg": "nDCG", "precision": "P", "success": "Success", "mrr": "RR", "map": "AP"}


def _measure(name: str) -> str:
    match = re.fullmatch(r"(\w+?)(?:@(\d+))?", name)
    if match is None or match.group(1) not in _NAMES:
        raise InputError(f"Unknown metric '{name}'. Expected one of {', '.join(_NAMES)}, with a cut such as recall@20.")
    return _NAMES[match.group(1)] + (f"@{match.group(2)}" if match.group(2) else "")


def distinct_scores(ranking: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Scores that keep a ranking's order and have no ties, so that every tool reads the same order.

    Tools break ties each in its own way, and float32 scores tie; the order as given is the ranking.
    """
    return {document: float(len(ranking) - rank) for rank, (document, _) in enumerate(ranking)}


def per_query(run: Run, qrels: Qrels, queries: Sequence[str], metrics: Sequence[str]) -> dict[str, np.ndarray]:
    """Each metric's value for each of ``queries``, in that order.

    Args:
        run: for each query id, ``(document id, score)`` best first. A query without an entry counts as 0.
        qrels: for each query id, relevance of its judged documents; above 0 is relevant.
        queries: ids to report; each must have at least one relevant document.
        metrics: names such as ``recall@20``, ``ndcg@10``, ``mrr``, ``map``, ``precision@5``, ``success@1``.

    Raises:
        InputError: a metric that is not known, or a query without a relevant document.
    """
    import ir_measures

    empty = [query for query in queries if not any(grade > 0 for grade in qrels.get(query, {}).values())]
    if empty:
        raise InputError(f"{len(empty)} queries have no relevant document ({', '.join(empty[:5])}); leave them out.")
    measures = {ir_measures.parse_measure(_measure(name)): name for name in metrics}
    values = {name: np.zeros(len(queries)) for name in metrics}
    position = {query: number for number, query in enumerate(queries)}
    judged = {query: {doc: int(grade) for doc, grade in qrels[query].items()} for query in queries}
    scored = {query: distinct_scores(run[query]) for query in queries if run.get(query)}
    for result in ir_measures.iter_calc(list(measures), judged, scored):
        values[measures[result.measure]][position[result.query_id]] = result.value
    return values
