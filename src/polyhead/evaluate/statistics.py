"""How sure a number is: bootstrap intervals, paired permutation tests, and Holm's correction for many comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from polyhead.errors import InputError

__all__ = [
    "Interval",
    "bootstrap_interval",
    "bootstrap_of",
    "holm",
    "paired_permutation",
    "resampled",
    "shifted_bootstrap",
]

_BLOCK = 2_000_000  # resampled values held at once


@dataclass(frozen=True)
class Interval:
    """A mean over ``n`` values with its interval."""

    value: float
    low: float
    high: float
    n: int


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean with its percentile bootstrap interval over the values (Efron 1979).

    Args:
        values: ``[n]``, one a query.
        level: coverage of the interval.
        resamples: bootstrap samples.
        seed: of the resampling.

    Raises:
        InputError: no values, or a value that is not a number.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise InputError(f"An interval needs at least one value and only numbers, got {values.size} values.")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _BLOCK // values.size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        means[start : start + count] = values[generator.integers(0, values.size, (count, values.size))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), int(values.size))


def bootstrap_of(
    statistic: Callable[[np.ndarray], float], n: int, *, level: float = 0.95, resamples: int = 1_000, seed: int = 0
) -> Interval:
    """Any statistic of ``n`` examples with its percentile bootstrap interval (Efron 1979).

    Args:
        statistic: ``statistic(rows) -> float`` for indices ``rows`` of examples, repeats among them.
        n: examples; the value is ``statistic(arange(n))``.
        level, resamples, seed: as in :func:`bootstrap_interval`. Resamples where the statistic is not a number (a
            correlation of constant values) are left out.

    Raises:
        InputError: no examples, or a statistic that is not a number in more than half of the resamples.
    """
    drawn = resampled(statistic, n, resamples=resamples, seed=seed)
    drawn = drawn[np.isfinite(drawn)]
    if drawn.size < resamples / 2:
        raise InputError(f"The statistic is not a number in {resamples - drawn.size} of {resamples} resamples.")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(np.arange(n))), float(low), float(high), n)


def resampled(statistic: Callable[[np.ndarray], float], n: int, *, resamples: int = 1_000, seed: int = 0) -> np.ndarray:
    """The statistic of ``resamples`` bootstrap samples of ``n`` examples, ``[resamples]``.

    Two statistics of the same examples under one seed see the same samples, so that their difference is paired.

    Raises:
        InputError: no examples.
    """
    if n < 1:
        raise InputError("An interval needs at least one example, got none.")
    generator = np.random.default_rng(seed)
    return np.array([statistic(generator.integers(0, n, n)) for _ in range(resamples)])


def shifted_bootstrap(differences: np.ndarray, observed: float) -> float:
    """Two-sided p-value of a difference that is no mean over examples (Efron and Tibshirani 1993, chapter 16).

    Where nothing differs, the resampled differences would spread around 0 as they now spread around the observed one:
    p is the share of them that lie further from ``observed`` than ``observed`` lies from 0, itself counted in.

    Args:
        differences: ``[resamples]`` of two statistics over the same bootstrap samples; those that are not numbers are
            left out.
        observed: the difference over the examples as they are.
    """
    spread = np.abs(differences[np.isfinite(differences)] - observed)
    return float((1 + (spread >= abs(observed) * (1 - 1e-12)).sum()) / (1 + spread.size))


def paired_permutation(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, *, resamples: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of the mean difference ``a - b`` under random swaps within pairs (Fisher's sign-flip test).

    All sign patterns are enumerated where there are at most ``resamples`` of them; else they are sampled, with the
    observed one counted in, so that p is never 0.

    Raises:
        InputError: ``a`` and ``b`` are not of the same length, or empty.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.size == 0:
        raise InputError(f"A paired test needs two lists of the same queries, got {a.size} and {b.size} values.")
    difference = a - b
    difference = difference[difference != 0]  # a zero changes no sum whatever its sign
    if difference.size == 0:
        return 1.0
    observed = abs(difference.sum()) - 1e-12 * np.abs(difference).sum()
    n = difference.size
    if n < 60 and 2**n <= resamples:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((np.abs((1 - 2 * patterns) @ difference) >= observed).mean())
    generator = np.random.default_rng(seed)
    reached = 0
    step = max(1, _BLOCK // n)
    for start in range(0, resamples, step):
        signs = 1 - 2 * generator.integers(0, 2, (min(step, resamples - start), n), dtype=np.int8)
        reached += int((np.abs(signs @ difference) >= observed).sum())
    return (reached + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values in the given order (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, position in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * float(p_values[position])))
        adjusted[int(position)] = running
    return adjusted
