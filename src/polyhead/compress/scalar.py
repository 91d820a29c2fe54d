"""Every feature on its own: one byte each, or one bit each."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from typing_extensions import Self

from polyhead.compress.vectors import Quantizer, checked
from polyhead.errors import InputError

__all__ = ["BinaryQuantizer", "Int8Quantizer"]


class Int8Quantizer(Quantizer):
    """A byte a feature: 256 equal steps between the least and the greatest value seen of it.

    Codes equal sentence-transformers' ``quantize_embeddings(precision="int8")``; what lies outside of the values seen
    is put at the nearest end. A code stands for the middle of its step.

    Attributes:
        starts_, steps_: ``[dim]`` least value and width of a step of each feature.

    Example:
        >>> vectors = np.array([[0.0, 255.0], [255.0, 0.0], [100.5, 3.0]], dtype=np.float32)
        >>> Int8Quantizer().fit(vectors).encode(vectors).tolist()
        [[-128, 127], [127, -128], [-28, -125]]
    """

    name: ClassVar[str] = "int8"
    starts_: np.ndarray
    steps_: np.ndarray

    def fit(self, vectors: np.ndarray) -> Self:
        """See :class:`Quantizer`."""
        vectors = checked(vectors)
        self.dim_ = vectors.shape[1]
        self.starts_ = vectors.min(0)
        steps = (vectors.max(0) - self.starts_) / 255
        self.steps_ = np.where(steps == 0, np.float32(1), steps)
        return self

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes ``[n, dim]`` int8."""
        steps = np.floor((self._queries(vectors) - self.starts_) / self.steps_)
        return (np.clip(steps, 0, 255) - 128).astype(np.int8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """See :class:`Quantizer`."""
        return self.starts_ + (codes.astype(np.float32) + 128.5) * self.steps_

    def scores(self, queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """See :class:`Quantizer`; the steps are taken into the queries."""
        queries = self._queries(queries)
        moved = queries @ (self.starts_ + 128.5 * self.steps_)
        found: np.ndarray = (queries * self.steps_) @ codes.astype(np.float32).T + moved[:, None]
        return found

    @property
    def bytes_per_vector(self) -> int:
        """Of a code."""
        return self.dim_


class BinaryQuantizer(Quantizer):
    """A bit a feature: its sign. Eight are a byte, the first in the highest bit.

    Codes equal sentence-transformers' ``quantize_embeddings(precision="ubinary")``.

    Args:
        queries: "binary" compares signs with signs (Hamming distance, fastest), "float" the query as it is with signs.

    Example:
        >>> vectors = np.array([[0.3, -0.2, 0.1, 0.0, -1.0, 2.0, 1.0, 1.0]])
        >>> BinaryQuantizer().fit(vectors).encode(vectors).tolist()
        [[167]]
    """

    name: ClassVar[str] = "binary"

    def __init__(self, queries: str = "binary") -> None:
        if queries not in ("binary", "float"):
            raise InputError(f"queries={queries!r} was given; expected 'binary' or 'float'.")
        self.queries = queries

    def fit(self, vectors: np.ndarray) -> Self:
        """See :class:`Quantizer`; only the number of features is learnt."""
        self.dim_ = checked(vectors).shape[1]
        return self

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Codes ``[n, dim / 8]`` uint8, rounded up."""
        return np.packbits(self._queries(vectors) > 0, axis=1)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """1 and -1, ``[n, dim]``."""
        bits = np.unpackbits(codes, axis=1, count=self.dim_)
        return bits.astype(np.float32) * 2 - 1

    def scores(self, queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Inner products with signs; of the query's signs where ``queries`` is "binary": ``dim - 2 Hamming``."""
        if self.queries == "float":
            return super().scores(queries, codes)
        own = self.encode(queries)
        distance = np.empty((len(own), len(codes)), np.float32)
        for at, query in enumerate(own):
            distance[at] = np.bitwise_count(codes ^ query).sum(1, dtype=np.int32)
        return self.dim_ - 2 * distance

    @property
    def bytes_per_vector(self) -> int:
        """Of a code."""
        return (self.dim_ + 7) // 8
