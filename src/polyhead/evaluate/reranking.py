"""Reranking: the candidates of a question put in order by similarity."""

from __future__ import annotations

from polyhead.evaluate.measured import Measured
from polyhead.evaluate.metrics import per_query
from polyhead.evaluate.task_data import RerankingData
from polyhead.evaluate.vectors import Encodes, Progress, unit, vectors

__all__ = ["measure_reranking", "rerank"]

METRICS = ("map", "mrr", "ndcg@10")


def rerank(
    data: RerankingData, encoder: Encodes, *, progress: Progress | None = None
) -> dict[str, list[tuple[str, float]]]:
    """Query id -> candidates as ``(document id, cosine)``, best first; equal ones by falling id, as trec_eval does."""
    asked = vectors(encoder, list(data.queries.values()), side="query")
    held = vectors(encoder, list(data.documents.values()), side="document", progress=progress)
    place = {name: number for number, name in enumerate(data.documents)}
    asked, held = (unit(one) for one in (asked, held))
    run = {}
    for question, (query, names) in zip(asked, data.candidates.items(), strict=True):
        scores = held[[place[name] for name in names]] @ question
        run[query] = sorted(
            ((name, float(score)) for name, score in zip(names, scores, strict=True)),
            key=lambda pair: (pair[1], pair[0]),
            reverse=True,
        )
    return run


def measure_reranking(
    data: RerankingData, encoder: Encodes, *, progress: Progress | None = None
) -> dict[str, Measured]:
    """``map``, ``mrr`` and ``ndcg@10`` of the order by cosine, one value a question.

    The values are mteb's ``map_at_1000``, ``mrr_at_1000`` and ``ndcg_at_10`` for the same vectors and candidates.

    Example:
        >>> from polyhead import Encoder
        >>> from polyhead.evaluate.reranking import measure_reranking
        >>> from polyhead.evaluate.task_data import load_reranking
        >>> measure_reranking(load_reranking("cranfield"), Encoder())["map"].interval()  # doctest: +SKIP
    """
    found = per_query(rerank(data, encoder, progress=progress), data.qrels, list(data.queries), METRICS)
    return {name: Measured.mean(values) for name, values in found.items()}
