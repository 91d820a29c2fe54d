"""From rankings to a report: every metric with its interval, every pair of strategies with its test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.errors import InputError
from polyhead.evaluate.measured import Measured
from polyhead.evaluate.measured import compare as compare_measured
from polyhead.evaluate.metrics import DEFAULT_METRICS, Run, distinct_scores, per_query
from polyhead.evaluate.report import Comparison, Report

if TYPE_CHECKING:
    from polyhead.evaluate.datasets import RetrievalData

__all__ = ["Comparison", "RetrievalReport", "evaluate_runs", "read_trec_run", "write_trec_run"]


RetrievalReport = Report


def evaluate_runs(
    data: RetrievalData,
    runs: Mapping[str, Run],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    compare: Sequence[str] | None = None,
    seed: int = 0,
    meta: Mapping[str, Any] | None = None,
) -> RetrievalReport:
    """Score rankings against the judgements.

    Args:
        data: the judgements, and the groups by which results are also given.
        runs: strategy -> query id -> ``(document id, score)`` best first. The first strategy is the one that all
            others are tested against.
        metrics: see :func:`polyhead.evaluate.metrics.per_query`.
        compare: metrics that are tested; by default ``recall@20`` and ``ndcg@10``, groups included.
        seed: of bootstrap and permutations.
        meta: kept in the report.

    Raises:
        InputError: no runs, or a metric that is not known.
    """
    if not runs:
        raise InputError("There is no run to evaluate; give at least one strategy.")
    queries = list(data.queries)
    tested = ("recall@20", "ndcg@10") if compare is None else tuple(compare)
    groups = list(_groups(data, queries))
    values = {name: per_query(run, data.qrels, queries, metrics) for name, run in runs.items()}
    measured = {
        name: {
            f"{metric}{suffix}": Measured.mean(by_metric[metric][members])
            for metric in metrics
            for suffix, members in groups
        }
        for name, by_metric in values.items()
    }
    names = [f"{metric}{suffix}" for metric in metrics if metric in tested for suffix, _ in groups]
    return compare_measured(
        measured, tested=names, seed=seed, meta={"data": data.name, "card": data.card, **(meta or {})}
    )


def _groups(data: RetrievalData, queries: Sequence[str]) -> Iterable[tuple[str, np.ndarray]]:
    yield "", np.arange(len(queries))
    for name, numbers in data.groups.items():
        of = np.array([numbers[query] for query in queries])
        if (of == 1).any() and (of >= 2).any():
            yield f"[{name}=1]", np.flatnonzero(of == 1)
            yield f"[{name}>=2]", np.flatnonzero(of >= 2)
        for number in sorted(set(of.tolist()) - {1}):
            yield f"[{name}={number}]", np.flatnonzero(of == number)


def write_trec_run(run: Run, path: str | Path, *, tag: str = "polyhead") -> None:
    """Write a run file: ``query Q0 document rank score tag``, ranks from 1, scores without ties.

    Raises:
        InputError: an id with white space in it, which the format cannot hold.
    """
    lines = []
    for query, ranking in run.items():
        for rank, (document, score) in enumerate(distinct_scores(ranking).items(), start=1):
            if any(len(name.split()) != 1 for name in (query, document, tag)):
                raise InputError(f"TREC run files hold ids without white space, got {query!r}, {document!r}, {tag!r}.")
            lines.append(f"{query} Q0 {document} {rank} {score:g} {tag}\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_trec_run(path: str | Path) -> dict[str, list[tuple[str, float]]]:
    """Read a run file, ordered by score and then by the file's order."""
    run: dict[str, list[tuple[str, float]]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        fields = line.split()
        if len(fields) != 6:
            raise InputError(f"'{path}', line {number}: expected 6 fields 'query Q0 document rank score tag'.")
        run.setdefault(fields[0], []).append((fields[2], float(fields[4])))
    return {query: sorted(ranking, key=lambda pair: -pair[1]) for query, ranking in run.items()}
