"""Two numbers of a data set as a network sees it: its intrinsic dimension, and how sharply labels change in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyhead.errors import InputError
from polyhead.evaluate.layers import LayerCurve, head_geometry, layer_vectors
from polyhead.evaluate.statistics import Interval
from polyhead.headmap import HeadMap
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = [
    "DatasetReport",
    "dataset_report",
    "head_dimension",
    "intrinsic_dimension",
    "label_sharpness",
    "neighbour_distances",
    "representation_dimension",
]

Method = Literal["mle", "twonn"]


def neighbour_distances(x: np.ndarray, k: int) -> np.ndarray:
    """Distances ``[n, k]`` of each vector to its ``k`` nearest others, nearest first; exact.

    Raises:
        InputError: vectors that are not ``[n, dim]`` numbers, or not more than ``k`` of them.
    """
    rows = np.asarray(x, dtype=np.float64)
    if rows.ndim != 2 or not np.isfinite(rows).all() or not 1 <= k < len(rows):
        raise InputError(f"{k} neighbours of finite vectors [n, dim] with n above {k}: got the shape {rows.shape}.")
    squares = (rows**2).sum(1)
    found = np.empty((len(rows), k))
    step = max(1, 4_000_000 // len(rows))
    for start in range(0, len(rows), step):
        own = slice(start, min(len(rows), start + step))
        distance = squares[own, None] + squares - 2 * rows[own] @ rows.T
        distance[np.arange(own.stop - start), np.arange(start, own.stop)] = np.inf
        near = np.argpartition(distance, k - 1, axis=1)[:, :k]
        # Taken again as differences: the sum above loses what is small beside the vectors' lengths.
        exact = np.linalg.norm(rows[own, None] - rows[near], axis=2)
        found[own] = np.sort(exact, axis=1)
    return found


@paper("intrinsic-dataset-properties")
def intrinsic_dimension(x: np.ndarray, method: Method = "mle", *, k: int = 20, discard: float = 0.1) -> float:
    """How many numbers it takes to say where a vector lies among the others.

    "mle" (Levina and Bickel 2004, averaged as MacKay and Ghahramani 2005): the inverse of the mean over vectors of
    ``1/(k-1) sum_j log(T_k / T_j)``, ``T_j`` the distance to the j-th neighbour.
    "twonn" (Facco et al. 2017): with ``mu = T_2 / T_1`` of each vector, sorted, the slope through 0 of
    ``-log(1 - F(mu))`` over ``log mu``, the ``discard`` highest left out.

    Vectors that have a copy have no nearest distance; they are taken once.

    Args:
        x: ``[n, dim]``.
        method: "mle" or "twonn".
        k: neighbours of mle.
        discard: share of the highest ratios left out by twonn.

    Raises:
        InputError: an unknown method, ``k`` below 2, ``discard`` outside 0 to 1, too few different vectors, or ones
            whose distances are all equal.

    Example:
        >>> import numpy as np
        >>> from polyhead.evaluate.intrinsic import intrinsic_dimension
        >>> plane = np.random.default_rng(0).random((1000, 2)) @ np.random.default_rng(1).normal(size=(2, 50))
        >>> round(intrinsic_dimension(plane), 1), round(intrinsic_dimension(plane, "twonn"), 1)
        (1.9, 1.9)
    """
    rows = np.unique(np.asarray(x, dtype=np.float64), axis=0)
    if method == "mle":
        if k < 2:
            raise InputError(f"k = {k}, expected at least 2 neighbours.")
        near = neighbour_distances(rows, k)
        inverse = float(np.log(near[:, -1:] / near[:, :-1]).mean())
    elif method == "twonn":
        if not 0 <= discard < 1:
            raise InputError(f"discard = {discard}, expected a share from 0 to below 1.")
        near = neighbour_distances(rows, 2)
        ratio = np.sort(np.log(near[:, 1] / near[:, 0]))
        kept = int(len(ratio) * (1 - discard)) if discard else len(ratio) - 1
        rising = -np.log(1 - np.arange(1, kept + 1) / len(ratio))
        inverse = float((ratio[:kept] ** 2).sum() / max((ratio[:kept] * rising).sum(), 1e-300))
    else:
        raise InputError(f"method = {method!r}, expected 'mle' or 'twonn'.")
    if not inverse > 0:
        raise InputError("All distances to the nearest vectors are equal; they show no dimension.")
    return 1 / inverse


@paper("intrinsic-dataset-properties")
def label_sharpness(x: np.ndarray, labels: Sequence[Any] | np.ndarray, *, pairs: int = 1000, seed: int = 0) -> float:
    """``K_F = max |y_j - y_k| / |x_j - x_k|`` over ``pairs`` times ``pairs`` vectors: large where look-alikes differ.

    The numerator is 1 for two different classes and 0 for one (numbers are taken as classes too). The paper's public
    code compares classes for equality instead; its definition is what is taken here. Copies with different labels make
    it infinite.

    Args:
        x: ``[n, dim]``.
        labels: ``[n]``.
        pairs: vectors drawn for each side; all where there are no more.
        seed: of the draw.

    Raises:
        InputError: other shapes, or one label only.
    """
    rows, of = np.asarray(x, dtype=np.float64), np.asarray(labels)
    if rows.ndim != 2 or len(of) != len(rows) or not np.isfinite(rows).all():
        raise InputError(
            f"Finite vectors [n, dim] and a label each are expected, got {rows.shape} and {len(of)} labels."
        )
    if len(set(of.tolist())) < 2:
        raise InputError("There is one label; sharpness is of labels that differ.")
    generator = np.random.default_rng(seed)
    n = len(rows)
    sides = [np.arange(n) if n <= pairs else generator.choice(n, pairs, replace=False) for _ in range(2)]
    first, second = (rows[side] for side in sides)
    square = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T
    square[of[sides[0]][:, None] == of[sides[1]]] = np.inf
    if not np.isfinite(square).any():
        raise InputError(f"No two of the {len(first)} vectors drawn differ in their label; raise pairs.")
    # The nearest few again as differences, as the sum above loses what is small beside the vectors' lengths.
    flat = np.argsort(square, axis=None)[: min(10, int(np.isfinite(square).sum()))]
    a, b = np.unravel_index(flat, square.shape)
    nearest = float(np.linalg.norm(first[a] - second[b], axis=1).min())
    return 1 / nearest if nearest > 0 else float("inf")


@dataclass(frozen=True)
class DatasetReport:
    """What :func:`dataset_report` measured.

    Attributes:
        dimension: intrinsic dimension by maximum likelihood, with a 95% interval from halves of the vectors.
        twonn: the same by two neighbours, as a check.
        sharpness: of the labels.
        n, ambient, copies: vectors, numbers in each, and how many are copies of another.
    """

    dimension: Interval
    twonn: float
    sharpness: float
    n: int
    ambient: int
    copies: int

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)


@paper("intrinsic-dataset-properties")
def dataset_report(
    x: np.ndarray, labels: Sequence[Any] | np.ndarray, *, k: int = 20, seed: int = 0, resamples: int = 50
) -> DatasetReport:
    """Dimension and sharpness of a labelled set of vectors.

    The interval is by subsampling, as a bootstrap's copies would have distance 0: ``resamples`` times half of the
    vectors without repeats, whose spread about their mean is that of the whole to first order.

    Args:
        x: ``[n, dim]``, more than ``2 k`` different vectors.
        labels: ``[n]``.
        k: neighbours.
        seed, resamples: of the interval and the pairs.
    """
    rows = np.unique(np.asarray(x, dtype=np.float64), axis=0)
    if len(rows) <= 2 * k:
        raise InputError(
            f"More than {2 * k} different vectors are needed for {k} neighbours in each half: {len(rows)}."
        )
    whole = intrinsic_dimension(rows, k=k)
    generator = np.random.default_rng(seed)
    halves = np.array(
        [intrinsic_dimension(rows[generator.permutation(len(rows))[: len(rows) // 2]], k=k) for _ in range(resamples)]
    )
    low, high = whole + np.quantile(halves - halves.mean(), [0.025, 0.975])
    return DatasetReport(
        Interval(whole, float(low), float(high), len(rows)),
        intrinsic_dimension(rows, "twonn"),
        label_sharpness(x, labels, seed=seed),
        len(x),
        rows.shape[1],
        len(x) - len(rows),
    )


@paper("intrinsic-dataset-properties")
def representation_dimension(
    model: HeadedModel, texts: Sequence[str], method: Method = "mle", *, k: int = 20, max_tokens: int = 128
) -> LayerCurve:
    """Intrinsic dimension of the mean-pooled vectors at every place between layers.

    Args:
        model: a text model.
        texts: more than ``k``.
        method, k: see :func:`intrinsic_dimension`.
        max_tokens: texts are cut after these.
    """
    pooled, _ = layer_vectors(model, texts, max_tokens=max_tokens)
    values = [intrinsic_dimension(pooled[:, place], method, k=k) for place in range(pooled.shape[1])]
    return LayerCurve(np.array(values), f"intrinsic dimension ({method})", model.name, f"{len(texts)} texts")


@paper("intrinsic-dataset-properties")
def head_dimension(
    model: HeadedModel, texts: Sequence[str], method: Method = "mle", *, k: int = 20, max_tokens: int = 128
) -> HeadMap:
    """Intrinsic dimension of each head's mean-pooled outputs; see :func:`representation_dimension`."""
    measure: Callable[[np.ndarray], float] = lambda x: intrinsic_dimension(x, method, k=k)  # noqa: E731
    return head_geometry(model, texts, measure, name=f"intrinsic dimension ({method})", max_tokens=max_tokens)
