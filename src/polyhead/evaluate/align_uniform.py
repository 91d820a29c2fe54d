"""Alignment and uniformity as an evaluation: how close positive pairs lie, and how evenly everything is spread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from polyhead.data import SentencePairs
from polyhead.errors import InputError
from polyhead.evaluate.measured import Measured
from polyhead.evaluate.vectors import Encodes, Progress, unit, vectors
from polyhead.papers import paper

__all__ = ["measure_align_uniform"]

LARGEST = 8_000


@paper("align-uniform")
def measure_align_uniform(
    data: SentencePairs,
    encoder: Encodes,
    *,
    positive: float = 4.0,
    alpha: float = 2.0,
    t: float = 2.0,
    progress: Progress | None = None,
) -> dict[str, Measured]:
    """``-alignment`` over the pairs people find alike, and ``-uniformity`` over all sentences (equations 1 and 2).

    Alignment is the mean ``|x - y|^alpha`` of unit vectors over positive pairs, uniformity ``log`` of the mean
    ``exp(-t |x - y|^2)`` over all pairs of different sentences. Both are negated, so that higher is better as in every
    report; the values are those of :func:`polyhead.objectives.alignment` and :func:`polyhead.objectives.uniformity`.

    Args:
        data: pairs; those of a gold score of at least ``positive`` are positive.
        encoder: gives the vectors, taken to length 1.
        positive: see above.
        alpha, t: exponents.
        progress: called with texts encoded and texts to encode.

    Raises:
        InputError: no positive pair, or more than 8,000 different sentences, whose pairs would not fit in memory.

    Example:
        >>> import numpy as np
        >>> from polyhead.data import SentencePairs
        >>> from polyhead.evaluate.align_uniform import measure_align_uniform
        >>> data = SentencePairs("toy", [("a", "b"), ("a", "c")], np.array([5.0, 0.0]), ["", ""])
        >>> points = {"a": [1.0, 0.0], "b": [1.0, 0.0], "c": [-1.0, 0.0]}
        >>> found = measure_align_uniform(data, lambda texts: np.array([points[text] for text in texts]))
        >>> found["-alignment"].n, round(found["-uniformity"].value, 3)
        (1, 1.098)
    """
    alike = np.flatnonzero(data.gold >= positive)
    if not len(alike):
        raise InputError(f"'{data.name}' has no pair scored {positive:g} and more; alignment is of such pairs.")
    sentences = list(dict.fromkeys(text for pair in data.pairs for text in pair))
    if len(sentences) > LARGEST:
        raise InputError(f"{len(sentences)} different sentences; take at most {LARGEST}, such as data.sample(3000).")
    found = unit(vectors(encoder, sentences, progress=progress).astype(np.float64))
    place = {text: number for number, text in enumerate(sentences)}
    sides = [found[[place[data.pairs[row][side]] for row in alike]] for side in (0, 1)]
    distance = np.linalg.norm(sides[0] - sides[1], axis=1) ** alpha
    closeness = np.exp(-t * np.clip(2 - 2 * found @ found.T, 0, None))
    np.fill_diagonal(closeness, 0.0)
    return {
        "-alignment": Measured.mean(-distance),
        "-uniformity": Measured(len(sentences), _spread(closeness)),
    }


def _spread(closeness: np.ndarray) -> Callable[[np.ndarray], float]:
    def of(rows: np.ndarray) -> float:
        weight = np.bincount(rows, minlength=len(closeness)).astype(np.float64)  # a sentence and its copy are no pair
        pairs = weight.sum() ** 2 - (weight**2).sum()
        return -float(np.log(weight @ closeness @ weight / pairs)) if pairs > 0 else float("nan")

    return of
