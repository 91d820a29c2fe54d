"""Product quantisation: a vector's parts, each the nearest of a few learnt ones."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from typing_extensions import Self

from polyhead.compress.vectors import Quantizer, checked
from polyhead.errors import InputError

__all__ = ["ProductQuantizer"]


class ProductQuantizer(Quantizer):
    """A byte for each part of a vector: the nearest of up to 256 centres learnt by k-means (Jegou et al. 2011).

    Args:
        parts: pieces of equal width that a vector is cut into; the bytes of a code.
        centres: of each part, 2 to 256.
        iterations: of k-means.
        sample: vectors that k-means learns from at most, drawn at random.
        seed: of the draw and of the first centres.

    Attributes:
        centres_: ``[parts, centres, dim / parts]`` float32.

    Raises:
        InputError: a number of parts that does not divide the features, or fewer vectors than centres.

    Example:
        >>> vectors = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
        >>> quantizer = ProductQuantizer(parts=16).fit(vectors)
        >>> quantizer.encode(vectors).shape, quantizer.search(vectors[:3], quantizer.encode(vectors), 1).rows[:, 0]
        ((1000, 16), array([0, 1, 2]))
    """

    name: ClassVar[str] = "product"
    centres_: np.ndarray

    def __init__(
        self, parts: int = 48, centres: int = 256, *, iterations: int = 20, sample: int = 65_536, seed: int = 0
    ) -> None:
        if parts < 1 or not 2 <= centres <= 256 or iterations < 1:
            raise InputError(
                f"parts={parts}, centres={centres}, iterations={iterations} were given; expected at least 1 part, 2 to "
                "256 centres, and at least 1 iteration."
            )
        self.parts, self.centres, self.iterations, self.sample, self.seed = parts, centres, iterations, sample, seed

    def fit(self, vectors: np.ndarray) -> Self:
        """See :class:`Quantizer`."""
        vectors = checked(vectors)
        if vectors.shape[1] % self.parts or len(vectors) < self.centres:
            raise InputError(
                f"{len(vectors)} vectors of {vectors.shape[1]} features were given for {self.parts} parts of "
                f"{self.centres} centres; expected parts that divide the features and at least as many vectors."
            )
        generator = np.random.default_rng(self.seed)
        if len(vectors) > self.sample:
            vectors = vectors[generator.choice(len(vectors), self.sample, replace=False)]
        self.dim_ = vectors.shape[1]
        pieces = vectors.reshape(len(vectors), self.parts, -1)
        self.centres_ = np.stack(
            [_k_means(pieces[:, at], self.centres, self.iterations, generator) for at in range(self.parts)]
        )
        return self

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes ``[n, parts]`` uint8."""
        vectors = self._queries(vectors)
        pieces = vectors.reshape(len(vectors), self.parts, -1)
        codes = np.empty((len(vectors), self.parts), np.uint8)
        for at, centres in enumerate(self.centres_):
            codes[:, at] = _nearest(pieces[:, at], centres)
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See :class:`Quantizer`."""
        return self.centres_[np.arange(self.parts), codes].reshape(len(codes), -1)

    @property
    def bytes_per_vector(self) -> int:
        """Of a code."""
        return self.parts


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Index of the nearest centre ``[n]`` of points ``[n, dim]``."""
    found = np.empty(len(points), np.int64)
    lengths = (centres**2).sum(1)
    for start in range(0, len(points), 16_384):
        here = points[start : start + 16_384]
        found[start : start + 16_384] = (lengths - 2 * here @ centres.T).argmin(1)
    return found


def _k_means(points: np.ndarray, count: int, iterations: int, generator: np.random.Generator) -> np.ndarray:
    """Centres ``[count, dim]`` by Lloyd's steps; an empty one begins again beside a centre of many points."""
    centres = points[generator.choice(len(points), count, replace=False)].copy()
    for _ in range(iterations):
        nearest = _nearest(points, centres)
        members = np.bincount(nearest, minlength=count)
        sums = np.stack([np.bincount(nearest, column, count) for column in points.T], 1)
        filled = members > 0
        centres[filled] = (sums[filled] / members[filled, None]).astype(np.float32)
        empty = np.flatnonzero(~filled)
        if len(empty):
            crowded = generator.choice(count, len(empty), p=members / members.sum())
            spread = points.std(0) * 1e-2
            centres[empty] = centres[crowded] + spread * generator.standard_normal((len(empty), points.shape[1]))
    return centres
