"""A metric that keeps its examples, so that it has an interval and can be tested against the same metric of another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyhead.errors import InputError
from polyhead.evaluate.report import Comparison, Report
from polyhead.evaluate.statistics import (
    Interval,
    bootstrap_interval,
    holm,
    paired_permutation,
    resampled,
    shifted_bootstrap,
)

__all__ = ["Measured", "compare"]

RESAMPLES = 1_000


@dataclass(frozen=True)
class Measured:
    """A metric over ``n`` examples that can be taken over any choice of them.

    Args:
        n: examples.
        of: ``of(rows) -> float`` for indices ``rows`` of examples, repeats among them.
        values: ``[n]``, where the metric is the mean of one value an example; else None.

    Example:
        >>> import numpy as np
        >>> from polyhead.evaluate.measured import Measured
        >>> hits = Measured.mean([1, 0, 1, 1])
        >>> hits.value, hits.of(np.array([0, 1]))
        (0.75, 0.5)
    """

    n: int
    of: Callable[[np.ndarray], float]
    values: np.ndarray | None = None

    @classmethod
    def mean(cls, values: Any) -> Measured:
        """The mean of one value an example."""
        kept = np.asarray(values, dtype=np.float64)
        return cls(len(kept), lambda rows: float(kept[rows].mean()), kept)

    @property
    def value(self) -> float:
        """Over all examples."""
        return float(self.of(np.arange(self.n)))

    def draws(self, *, resamples: int | None = None, seed: int = 0) -> np.ndarray:
        """The metric of bootstrap samples ``[resamples]``; the same samples for every metric of as many examples."""
        return resampled(self.of, self.n, resamples=resamples or RESAMPLES, seed=seed)

    def interval(self, *, seed: int = 0) -> Interval:
        """Value with its 95% percentile bootstrap interval: of 10,000 samples for a mean, else of 1,000."""
        if self.values is not None:
            return bootstrap_interval(self.values, seed=seed)
        return _interval(self.value, self.draws(seed=seed), self.n)

    def against(self, other: Measured, *, seed: int = 0) -> tuple[Interval, float]:
        """The difference to the same metric of another on the same examples: with its interval, and its p-value.

        Means are tested by sign flips (:func:`~polyhead.evaluate.statistics.paired_permutation`), other statistics by
        the shifted bootstrap (:func:`~polyhead.evaluate.statistics.shifted_bootstrap`).

        Raises:
            InputError: other examples.
        """
        if self.n != other.n:
            raise InputError(f"A paired test needs the same examples, got {self.n} and {other.n}.")
        if self.values is not None and other.values is not None:
            found = bootstrap_interval(self.values - other.values, seed=seed)
            return found, paired_permutation(self.values, other.values, seed=seed)
        return _difference(self, other, self.draws(seed=seed), other.draws(seed=seed))


def _interval(value: float, draws: np.ndarray, n: int) -> Interval:
    known = draws[np.isfinite(draws)]
    if known.size < draws.size / 2:
        raise InputError(f"The metric is not a number in {draws.size - known.size} of {draws.size} resamples.")
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(value, float(low), float(high), n)


def _difference(a: Measured, b: Measured, of_a: np.ndarray, of_b: np.ndarray) -> tuple[Interval, float]:
    found = _interval(a.value - b.value, of_a - of_b, a.n)
    return found, shifted_bootstrap(of_a - of_b, found.value)


def compare(
    measured: Mapping[str, Mapping[str, Measured]],
    *,
    tested: Collection[str] | None = None,
    seed: int = 0,
    meta: Mapping[str, Any] | None = None,
) -> Report:
    """Every metric of every candidate with its interval, and every other candidate against the first, Holm-corrected.

    Args:
        measured: candidate -> metric -> what was measured; the metrics and examples of all are the same.
        tested: metrics that are tested; by default all.
        seed: of bootstrap and permutations.
        meta: kept in the report.

    Raises:
        InputError: no candidate, or candidates measured on other examples.
    """
    if not measured:
        raise InputError("There is nothing to compare; give at least one candidate.")
    first, *others = measured
    drawn: dict[tuple[str, str], np.ndarray] = {}
    results: dict[str, dict[str, Interval]] = {}
    for name, metrics in measured.items():
        results[name] = {}
        for metric, one in metrics.items():
            if one.values is None:
                drawn[name, metric] = one.draws(seed=seed)
                results[name][metric] = _interval(one.value, drawn[name, metric], one.n)
            else:
                results[name][metric] = one.interval(seed=seed)
    rows: list[tuple[str, str, Interval, float]] = []
    for other in others:
        for metric, one in measured[first].items():
            if tested is not None and metric not in tested:
                continue
            rival = measured[other][metric]
            if (first, metric) in drawn and one.n == rival.n:
                found, p = _difference(one, rival, drawn[first, metric], drawn[other, metric])
            else:
                found, p = one.against(rival, seed=seed)
            rows.append((other, metric, found, p))
    corrected = holm([p for *_, p in rows])
    comparisons = [
        Comparison(first, other, metric, found.value, found.low, found.high, p, p_holm)
        for (other, metric, found, p), p_holm in zip(rows, corrected, strict=True)
    ]
    kinds = {one.values is None for metrics in measured.values() for one in metrics.values()}
    how = {True: "shifted paired bootstrap", False: "paired permutation test"}
    tests = " or ".join(how[kind] for kind in sorted(kinds))
    return Report(results, comparisons, {"seed": seed, "tests": tests, **(meta or {})})
