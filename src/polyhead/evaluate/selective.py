"""Selective classification: a classifier may abstain; how much undetected failure does its confidence leave?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from polyhead.errors import InputError
from polyhead.evaluate.measured import Measured, compare
from polyhead.evaluate.report import Report
from polyhead.papers import paper

__all__ = [
    "RiskCoverage",
    "augrc",
    "aurc",
    "compare_confidences",
    "confidences",
    "e_aurc",
    "failure_auroc",
    "risk_coverage",
]


@dataclass(frozen=True)
class RiskCoverage:
    """Risks at each threshold that the confidences allow, from "accept none" to "accept all".

    Attributes:
        coverage: ``[t]`` share of the examples that are accepted, 0 to 1.
        selective: ``[t]`` mean error among the accepted; 0 where none is accepted.
        generalised: ``[t]`` error accepted, over all examples: the chance of a failure that is not caught.
    """

    coverage: np.ndarray
    selective: np.ndarray
    generalised: np.ndarray


def _checked(confidence: Any, error: Any) -> tuple[np.ndarray, np.ndarray]:
    sure, wrong = (np.asarray(one, dtype=np.float64) for one in (confidence, error))
    if sure.ndim != 1 or sure.shape != wrong.shape or not len(sure) or not np.isfinite(sure).all():
        raise InputError(
            f"One finite confidence and one error an example are expected, got the shapes {sure.shape}, {wrong.shape}."
        )
    if not ((wrong >= 0) & (wrong <= 1)).all():
        raise InputError(f"Errors lie in 0 to 1 (1: failed), found {wrong.min():g} to {wrong.max():g}.")
    return sure, wrong


@paper("augrc")
def risk_coverage(confidence: Any, error: Any) -> RiskCoverage:
    """Risks while ever less confident examples are accepted; those of one confidence are accepted together.

    Args:
        confidence: ``[n]``, higher is surer.
        error: ``[n]`` loss of each example in 0 to 1, such as 1 where the classifier failed.

    Raises:
        InputError: other shapes, no examples, errors outside 0 to 1.

    Example:
        >>> from polyhead.evaluate.selective import risk_coverage
        >>> curve = risk_coverage([0.9, 0.8, 0.7, 0.6], [0, 1, 0, 0])
        >>> curve.coverage.tolist(), curve.generalised.tolist()
        ([0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.25, 0.25, 0.25])
    """
    sure, wrong = _checked(confidence, error)
    order = np.argsort(-sure, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(sure[order])), len(sure) - 1)
    accepted, failed = np.append(0, ends + 1), np.append(0.0, np.cumsum(wrong[order])[ends])
    return RiskCoverage(accepted / len(sure), failed / np.maximum(accepted, 1), failed / len(sure))


@paper("augrc")
def augrc(confidence: Any, error: Any) -> float:
    """Area under the generalised risk over coverage 0 to 1: the mean chance of a failure that is not caught; 0 to 1/2.

    With errors of 0 and 1 it is ``(1 - AUROC) acc (1 - acc) + (1 - acc)^2 / 2`` (equation 6): what ranking costs, and
    what the classifier costs whatever the ranking. Ties count as their mean over all orders.

    Args:
        confidence, error: see :func:`risk_coverage`.

    Example:
        >>> from polyhead.evaluate.selective import augrc
        >>> augrc([0.9, 0.8, 0.7, 0.6], [0, 0, 0, 1]), augrc([0.9, 0.8, 0.7, 0.6], [1, 0, 0, 0])
        (0.03125, 0.21875)
    """
    curve = risk_coverage(confidence, error)
    return float((np.diff(curve.coverage) * (curve.generalised[1:] + curve.generalised[:-1]) / 2).sum())


@paper("augrc")
def aurc(confidence: Any, error: Any) -> float:
    """The usual area: mean of the selective risk among the ``k`` surest, over ``k = 1..n`` (Geifman et al. 2019).

    Weighs failures at high confidence far more than others, which is what AUGRC mends. Ties count as their mean over
    all orders.

    Args:
        confidence, error: see :func:`risk_coverage`.
    """
    sure, wrong = _checked(confidence, error)
    order = np.argsort(-sure, kind="stable")
    _, group, counts = np.unique(-sure[order], return_inverse=True, return_counts=True)
    expected = (np.bincount(group, weights=wrong[order]) / counts)[group]
    return float((np.cumsum(expected) / np.arange(1, len(sure) + 1)).mean())


@paper("augrc")
def e_aurc(confidence: Any, error: Any) -> float:
    """:func:`aurc` less that of the best ranking of the same errors; 0 where the rest is surer than every failure."""
    sure, wrong = _checked(confidence, error)
    return aurc(sure, wrong) - aurc(-wrong, wrong)


@paper("augrc")
def failure_auroc(confidence: Any, error: Any) -> float:
    """Chance that a right answer is surer than a failure, ties half; NaN where all are right, or all wrong.

    Args:
        confidence: ``[n]``.
        error: ``[n]``, 0 or 1.

    Raises:
        InputError: errors other than 0 and 1.
    """
    sure, wrong = _checked(confidence, error)
    if not np.isin(wrong, (0, 1)).all():
        raise InputError("AUROC tells right from wrong: errors of 0 and 1 are expected.")
    failed = int(wrong.sum())
    right = len(wrong) - failed
    if not failed or not right:
        return float("nan")
    return float((rankdata(sure)[wrong == 0].sum() - right * (right + 1) / 2) / (failed * right))


@paper("augrc")
def confidences(
    probabilities: np.ndarray, *, vectors: np.ndarray | None = None, known: np.ndarray | None = None, k: int = 5
) -> dict[str, np.ndarray]:
    """Ways to be sure, each ``[n]``, higher is surer.

    "maximum": the highest probability; "margin": less the second; "negative entropy"; "squares": the sum of squared
    probabilities; and where vectors are given "nearest": the negative mean cosine distance to the ``k`` nearest of the
    known vectors, and "centre": the cosine to their mean.

    Args:
        probabilities: ``[n, classes]``.
        vectors: ``[n, dim]`` of the examples.
        known: ``[m, dim]`` of the examples learnt from.
        k: neighbours.

    Raises:
        InputError: other shapes, fewer than two classes, rows that do not sum to 1, or fewer known vectors than ``k``.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim != 2 or p.shape[1] < 2 or not np.allclose(p.sum(1), 1, atol=1e-4) or (p < 0).any():
        raise InputError(f"Probabilities [n, classes] that sum to 1 are expected, got the shape {p.shape}.")
    ranked = np.sort(p, axis=1)
    found = {
        "maximum": ranked[:, -1],
        "margin": ranked[:, -1] - ranked[:, -2],
        "negative entropy": (p * np.log(np.clip(p, 1e-300, None))).sum(1),
        "squares": (p**2).sum(1),
    }
    if vectors is not None and known is not None:
        from polyhead.evaluate.vectors import unit

        if len(vectors) != len(p) or not 1 <= k <= len(known):
            raise InputError(
                f"{len(p)} vectors and at least {k} known ones are expected: {len(vectors)}, {len(known)}."
            )
        cosine = unit(vectors) @ unit(known).T
        found["nearest"] = np.sort(cosine, axis=1)[:, -k:].mean(1) - 1
        found["centre"] = unit(vectors) @ unit(unit(known).mean(0, keepdims=True))[0]
    return found


@paper("augrc")
def compare_confidences(scores: Mapping[str, np.ndarray], error: Any, *, seed: int = 0) -> Report:
    """Confidences on the same examples: AUGRC, AURC and failure AUROC with intervals, tested against the first.

    Areas are negated, as every metric of a report is better the higher it is.

    Args:
        scores: name -> ``[n]`` confidence.
        error: ``[n]`` 0 or 1, or per name where the classifiers differ: a mapping of the same names.
        seed: of the bootstrap.

    Raises:
        InputError: see :func:`risk_coverage`; all right, or all wrong.

    Example:
        >>> import numpy as np
        >>> from polyhead.evaluate.selective import compare_confidences
        >>> sure = np.linspace(0, 1, 60)
        >>> wrong = (sure < 0.3).astype(float)
        >>> report = compare_confidences({"good": sure, "bad": np.sin(99 * sure)}, wrong)
        >>> round(-report.results["good"]["-augrc"].value, 4), report.comparisons[0].p_holm < 0.05
        (0.045, True)
    """
    metrics = {"-augrc": (augrc, -1.0), "-aurc": (aurc, -1.0), "failure auroc": (failure_auroc, 1.0)}
    measured = {}
    for name, confidence in scores.items():
        sure, wrong = _checked(confidence, error[name] if isinstance(error, Mapping) else error)
        if not 0 < wrong.sum() < len(wrong):
            raise InputError(f"'{name}': {int(wrong.sum())} of {len(wrong)} failed; some of both are needed.")
        measured[name] = {
            metric: Measured(len(sure), _over(of, sign, sure, wrong)) for metric, (of, sign) in metrics.items()
        }
    return compare(measured, seed=seed, meta={"task": "selective classification"})


def _over(
    metric: Callable[[Any, Any], float], sign: float, sure: np.ndarray, wrong: np.ndarray
) -> Callable[[np.ndarray], float]:
    return lambda rows: sign * metric(sure[rows], wrong[rows])
