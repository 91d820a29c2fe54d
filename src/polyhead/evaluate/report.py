"""What a comparison says: every metric with its interval, every difference with its test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead.evaluate.statistics import Interval

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "Report"]


@dataclass(frozen=True)
class Comparison:
    """Candidate ``a`` (a strategy, a model) against ``b`` on one metric: the difference ``a`` less ``b``, its
    interval, and the paired test.

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
class Report:
    """Results of candidates (strategies, models) on one data set.

    Attributes:
        results: candidate -> metric -> value with interval. Metrics are named ``recall@20``, and over a group of
            examples ``recall@20[aspects>=2]``.
        comparisons: every other candidate against the first one.
        meta: data, model, settings, versions; under "tests" how p-values were found.
    """

    results: dict[str, dict[str, Interval]]
    comparisons: list[Comparison] = field(default_factory=list)
    meta: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """``results[candidate][metric] = {value, low, high, n}``, ``comparisons`` and ``meta`` as plain values."""
        return {
            "results": {
                name: {metric: vars(interval) for metric, interval in metrics.items()}
                for name, metrics in self.results.items()
            },
            "comparisons": [vars(comparison) for comparison in self.comparisons],
            "meta": self.meta,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Report:
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
    def load(cls, path: str | Path) -> Report:
        """Read what :meth:`save` wrote."""
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))

    def table(self) -> Table:
        """A table for people: best in bold, intervals, a mark where the test tells a candidate from the first one."""
        from rich.markup import escape
        from rich.table import Table

        names = list(self.results)
        first = names[0]
        tests = {(c.metric, name): c.p_holm for c in self.comparisons for name in (c.a, c.b) if name != first}
        caption = "95% bootstrap intervals."
        if tests:
            caption += f" * differs from {first} ({self.meta.get('tests', 'paired test')}, Holm, 5%)."
        table = Table(
            title=f"{self.meta.get('data', 'evaluation')} · {self.meta.get('model', '')}".rstrip(" ·"),
            caption=escape(caption),
        )
        table.add_column("metric", no_wrap=True)
        table.add_column("n", justify="right")
        for name in names:
            table.add_column(escape(name), justify="right", no_wrap=True)
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
