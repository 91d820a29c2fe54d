"""Pair classification: how well one threshold on the similarity tells pairs that belong together from others."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from polyhead.data import SentencePairs
from polyhead.errors import InputError
from polyhead.evaluate.measured import Measured
from polyhead.evaluate.vectors import Encodes, Progress, paired_cosine, vectors

__all__ = ["average_precision", "best_accuracy", "best_f1", "best_threshold", "measure_pairs", "similarities"]

Curve = tuple[np.ndarray, np.ndarray, int]


def similarities(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Similarity ``[n]`` of each row of ``a`` to that of ``b``: cosine, dot product, negative distances."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return {
        "cosine": paired_cosine(x, y),
        "dot": (x * y).sum(1),
        "euclidean": -np.linalg.norm(x - y, axis=1),
        "manhattan": -np.abs(x - y).sum(1),
    }


def _curve(scores: np.ndarray, labels: np.ndarray) -> Curve:
    """Cuts between different scores, highest first: their places, positives above each, and positives in all."""
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    cuts = np.append(np.flatnonzero(ranked[:-1] != ranked[1:]), len(scores) - 1)
    return cuts, np.cumsum(labels[order])[cuts], int(labels.sum())


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean of the precision over recall, tied scores cut together; NaN without a positive."""
    cuts, hits, positives = _curve(scores, labels)
    if not positives:
        return float("nan")
    return float((np.diff(hits, prepend=0) * hits / (cuts + 1)).sum() / positives)


def best_accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """The highest accuracy of any threshold that has pairs on both sides; 0 where all scores are equal."""
    cuts, hits, positives = _curve(scores, labels)
    right = hits + (len(labels) - positives) - (cuts + 1 - hits)
    return float(right[:-1].max() / len(labels)) if len(cuts) > 1 else 0.0


def best_f1(scores: np.ndarray, labels: np.ndarray) -> float:
    """The highest F1 of any threshold that has pairs on both sides; 0 where all scores are equal."""
    cuts, hits, positives = _curve(scores, labels)
    values = 2 * hits / (cuts + 1 + max(positives, 1))
    return float(values[:-1].max()) if len(cuts) > 1 else 0.0


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The threshold of :func:`best_accuracy`, halfway between the scores around it.

    Raises:
        InputError: all scores are equal, so that no threshold has pairs on both sides.
    """
    cuts, hits, positives = _curve(scores, labels)
    if len(cuts) < 2:
        raise InputError(f"All {len(scores)} scores are equal; no threshold parts them.")
    right = hits + (len(labels) - positives) - (cuts + 1 - hits)
    ranked = np.sort(scores)[::-1]
    at = int(cuts[int(right[:-1].argmax())])
    return float((ranked[at] + ranked[at + 1]) / 2)


def measure_pairs(data: SentencePairs, encoder: Encodes, *, progress: Progress | None = None) -> dict[str, Measured]:
    """Encode both sides of the pairs and part them by similarity.

    ``cosine ap``, ``cosine accuracy`` and ``cosine f1`` with the cosine; ``max ap``, ``max accuracy`` and ``max f1``
    the highest over cosine, dot product, Euclidean and Manhattan distance. The values are mteb's for the same vectors.
    The threshold is chosen on the pairs it is judged by, as mteb does, and anew in each resample.

    Args:
        data: with labels 0 and 1 as ``gold``.

    Raises:
        InputError: labels that are not both 0 and 1.

    Example:
        >>> from polyhead.evaluate.pairs import measure_pairs
        >>> from polyhead.evaluate.task_data import load_pairs
        >>> from polyhead import Encoder
        >>> measure_pairs(load_pairs("sts-2015", labels=True), Encoder())["max ap"].interval()  # doctest: +SKIP
    """
    labels = data.gold.astype(np.int64)
    if set(data.gold.tolist()) != {0.0, 1.0}:
        raise InputError(f"Pairs need labels 0 and 1, both of them; got {sorted(set(data.gold.tolist()))[:5]}.")
    first, second = zip(*data.pairs, strict=True)
    found = vectors(encoder, [*first, *second], progress=progress)
    scores = similarities(found[: len(first)], found[len(first) :])
    metrics = {"ap": average_precision, "accuracy": best_accuracy, "f1": best_f1}
    n = len(labels)
    measured = {f"max {name}": Measured(n, _highest(of, list(scores.values()), labels)) for name, of in metrics.items()}
    for name, of in metrics.items():
        measured[f"cosine {name}"] = Measured(n, _highest(of, [scores["cosine"]], labels))
    return measured


def _highest(
    metric: Callable[[np.ndarray, np.ndarray], float], scores: list[np.ndarray], labels: np.ndarray
) -> Callable[[np.ndarray], float]:
    return lambda rows: max(metric(some[rows], labels[rows]) for some in scores)
