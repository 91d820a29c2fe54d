"""From rankings to a report: every metric with its interval, every pair of strategies with its test."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.errors import InputError
from polyhead.evaluate.metrics import DEFAULT_METRICS, Run, distinct_scores, per_query
from polyhead.evaluate.statistics import Interval, bootstrap_interval, holm, paired_permutation

if TYPE_CHECKING:
    from rich.table import Table

    from polyhead.evaluate.datasets import RetrievalData

__all__ = ["Comparison", "RetrievalReport", "evaluate_runs", "read_trec_run", "write_trec_run"]


@dataclass(frozen=True)
class Comparison:
    """Strategy ``a`` against ``b`` on one metric: mean difference, its interval, and the paired test.

    ``p_holm`` is ``p`` corrected for all comparisons of the report.
    """

    a: str
    b: str
    metric: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float


@dataclass
class RetrievalReport:
    """Results of strategies on one data set.

    Attributes:
        results: strategy -> metric -> mean with interval. Metrics are named ``recall@20``, and over a group of
            queries ``recall@20[aspects>=2]``.
        comparisons: every other strategy against the first one.
        meta: data, model, settings, versions.
    """

    results: dict[str, dict[str, Interval]]
    comparisons: list[Comparison] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """``results[strategy][metric] = {value, low, high, n}``, ``comparisons`` and ``meta`` as plain values."""
        return {
            "results": {
                name: {metric: vars(interval) for metric, interval in metrics.items()}
                for name, metrics in self.results.items()
            },
            "comparisons": [vars(comparison) for comparison in self.comparisons],
            "meta": self.meta,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> RetrievalReport:
        """The inverse of :meth:`to_json`."""
        results = {
            name: {metric: Interval(**interval) for metric, interval in metrics.items()}
            for name, metrics in plain["results"].items()
        }
        return cls(results, [Comparison(**row) for row in plain["comparisons"]], dict(plain["meta"]))

    def save(self, path: str | Path) -> None:
        """Write the JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> RetrievalReport:
        """Read what :meth:`save` wrote."""
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))

    def table(self) -> Table:
        """A table for people: best in bold, intervals, a mark where the test tells a strategy from the first one."""
        from rich.markup import escape
        from rich.table import Table

        names = list(self.results)
        first = names[0]
        table = Table(
            title=f"{self.meta.get('data', 'retrieval')} · {self.meta.get('model', '')}".rstrip(" ·"),
            caption=f"95% bootstrap intervals. * differs from {first} (paired permutation test, Holm, 5%).",
        )
        table.add_column("metric", no_wrap=True)
        table.add_column("n", justify="right")
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
        tests = {(c.metric, name): c.p_holm for c in self.comparisons for name in (c.a, c.b) if name != first}
        for metric, sample in self.results[first].items():
            best = max(self.results[name][metric].value for name in names)
            cells = []
            for name in names:
                found = self.results[name][metric]
                mark = "*" if tests.get((metric, name), 1.0) < 0.05 else ""
                value = f"{found.value:.3f}{mark}"
                bold = f"[bold]{value}[/]" if found.value == best else value
                cells.append(f"{bold}\n[dim]{found.low:.2f}–{found.high:.2f}[/]")
            table.add_row(escape(metric), str(sample.n), *cells)
        return table


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
    results: dict[str, dict[str, Interval]] = {}
    for name, by_metric in values.items():
        results[name] = {
            f"{metric}{suffix}": bootstrap_interval(by_metric[metric][members], seed=seed)
            for metric in metrics
            for suffix, members in groups
        }
    first = next(iter(runs))
    compared = [
        _compare(
            first, other, f"{metric}{suffix}", values[first][metric][members], values[other][metric][members], seed
        )
        for other in runs
        if other != first
        for metric in metrics
        if metric in tested
        for suffix, members in groups
    ]
    corrected = holm([comparison.p for comparison in compared])
    comparisons = [Comparison(**{**vars(c), "p_holm": p}) for c, p in zip(compared, corrected, strict=True)]
    return RetrievalReport(results, comparisons, {"data": data.name, "card": data.card, "seed": seed, **(meta or {})})


def _compare(a: str, b: str, metric: str, of_a: np.ndarray, of_b: np.ndarray, seed: int) -> Comparison:
    interval = bootstrap_interval(of_a - of_b, seed=seed)
    p = paired_permutation(of_a, of_b, seed=seed)
    return Comparison(a, b, metric, interval.value, interval.low, interval.high, p, p)


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
