"""Semantic textual similarity: does the cosine of two sentences follow how alike people find them?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata

from polyhead.data import SentencePairs
from polyhead.errors import InputError
from polyhead.evaluate.measured import Measured
from polyhead.evaluate.vectors import Encodes, Progress, paired_cosine, vectors

__all__ = ["correlations", "measure_sts", "pearson", "spearman"]


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation; NaN where one side does not vary."""
    a, b = a - a.mean(), b - b.mean()
    length = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / length if length > 0 else float("nan")


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties sharing their rank; NaN where one side does not vary."""
    return pearson(rankdata(a), rankdata(b))


def correlations(similarity: np.ndarray, data: SentencePairs) -> dict[str, Measured]:
    """``spearman`` and ``pearson`` over all pairs, as mteb takes them, and ``spearman[mean of groups]`` where there are
    several groups, as SemEval's tables average them.

    Args:
        similarity: ``[n]``, of each pair.
        data: with the people's scores.

    Raises:
        InputError: another number of pairs, or fewer than 3.
    """
    gold = data.gold
    if len(similarity) != len(gold) or len(gold) < 3:
        raise InputError(f"A correlation needs 3 pairs and a similarity for each, got {len(similarity)}, {len(gold)}.")
    n = len(gold)
    found = {
        name: Measured(n, lambda rows, of=of: of(similarity[rows], gold[rows]))  # type: ignore[misc]
        for name, of in (("spearman", spearman), ("pearson", pearson))
    }
    groups = sorted(set(data.group))
    if len(groups) > 1:
        number = np.array([groups.index(group) for group in data.group])
        found["spearman[mean of groups]"] = Measured(n, _mean_of_groups(similarity, gold, number, len(groups)))
    return found


def _mean_of_groups(
    similarity: np.ndarray, gold: np.ndarray, number: np.ndarray, groups: int
) -> Callable[[np.ndarray], float]:
    def of(rows: np.ndarray) -> float:
        members = [rows[number[rows] == group] for group in range(groups)]
        return float(np.mean([spearman(similarity[some], gold[some]) if len(some) else np.nan for some in members]))

    return of


def measure_sts(data: SentencePairs, encoder: Encodes, *, progress: Progress | None = None) -> dict[str, Measured]:
    """Encode both sides of the pairs and correlate their cosines with the people's scores.

    The values are mteb's ``cosine_spearman`` and ``cosine_pearson`` for the same vectors.

    Example:
        >>> import numpy as np
        >>> from polyhead.data import SentencePairs
        >>> from polyhead.evaluate.sts import measure_sts
        >>> pairs = [("a", "a"), ("a", "ab"), ("a", "b")]
        >>> data = SentencePairs("toy", pairs, np.array([5.0, 3.0, 0.0]), [""] * 3)
        >>> letters = lambda texts: np.array([[text.count("a"), text.count("b")] for text in texts], float)
        >>> round(measure_sts(data, letters)["spearman"].value, 3)
        1.0
    """
    first, second = zip(*data.pairs, strict=True)
    found = vectors(encoder, [*first, *second], progress=progress)
    return correlations(paired_cosine(found[: len(first)], found[len(first) :]), data)
