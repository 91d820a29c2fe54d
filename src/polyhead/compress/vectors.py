"""Stored vectors in fewer bytes: what quantisers have in common, how they are searched, and what that costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple, TypeAlias

import numpy as np
from typing_extensions import Self

from polyhead.compress.report import Cost, Report
from polyhead.errors import InputError

__all__ = ["Found", "Quantizer", "Rescore", "checked", "compress_vectors"]

_BLOCK = 16_384
"""Documents scored at once."""


class Found(NamedTuple):
    """The nearest documents of each query, best first.

    Attributes:
        scores: ``[queries, k]`` float32.
        rows: ``[queries, k]`` of the documents.
    """

    scores: np.ndarray
    rows: np.ndarray


class Quantizer(ABC):
    """Vectors to codes and back; similarity is the inner product (the cosine, for vectors of length 1)."""

    name: ClassVar[str]
    dim_: int
    """Features of a vector, known after :meth:`fit`."""

    @abstractmethod
    def fit(self, vectors: np.ndarray) -> Self:
        """Learn from a sample of vectors ``[n, dim]`` such as will be stored."""

    @abstractmethod
    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """``[n, dim]`` floats -> codes ``[n, width]``."""

    @abstractmethod
    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes ``[n, width]`` -> the float32 vectors ``[n, dim]`` they stand for."""

    @property
    @abstractmethod
    def bytes_per_vector(self) -> int:
        """Of a code."""

    def scores(self, queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Inner products ``[queries, n]`` of queries as they are with the vectors that codes stand for."""
        found: np.ndarray = self._queries(queries) @ self.decode(codes).T
        return found

    def search(
        self,
        queries: np.ndarray,
        codes: np.ndarray,
        k: int = 10,
        *,
        rescore: Rescore | None = None,
        oversample: int = 4,
    ) -> Found:
        """The ``k`` nearest documents of each query.

        Args:
            queries: ``[queries, dim]`` floats.
            codes: ``[n, width]`` of the documents, as :meth:`encode` gave them; may be a memory map.
            k: how many; fewer where there are fewer documents.
            rescore: what gives better scores to the first ``oversample x k``: the vectors themselves ``[n, dim]`` (a
                memory map reads only these rows), or another fitted quantiser and its codes.
            oversample: candidates a place, with ``rescore``.

        Raises:
            InputError: counts below 1, or arrays that do not belong together.
        """
        queries = self._queries(queries)
        if k < 1 or oversample < 1:
            raise InputError(f"k={k} and oversample={oversample} were given; expected at least 1.")
        wanted = k if rescore is None else k * oversample
        first = _top(lambda some: self.scores(queries, some), len(queries), codes, wanted)
        if rescore is None:
            return first
        better, kept = rescore if isinstance(rescore, tuple) else (None, rescore)
        if len(kept) != len(codes):
            raise InputError(
                f"{len(kept)} vectors to rescore with were given for {len(codes)} codes; expected one each."
            )
        scores = np.empty(first.rows.shape, np.float32)
        for at, (query, rows) in enumerate(zip(queries, first.rows, strict=True)):
            own = np.asarray(kept[rows])
            scores[at] = own @ query if better is None else better.scores(query[None], own)[0]
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return Found(np.take_along_axis(scores, order, 1), np.take_along_axis(first.rows, order, 1))

    def _queries(self, queries: np.ndarray) -> np.ndarray:
        if not hasattr(self, "dim_"):
            raise InputError(f"{type(self).__name__} has learnt nothing yet: call fit(vectors) first.")
        return checked(queries, self.dim_)


Rescore: TypeAlias = "np.ndarray | tuple[Quantizer, np.ndarray]"


def checked(vectors: np.ndarray, dim: int | None = None) -> np.ndarray:
    """Vectors as float32 ``[n, dim]``.

    Raises:
        InputError: another shape, no vectors to learn from (``dim`` None), or numbers that are not finite.
    """
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or (dim is not None and vectors.shape[1] != dim):
        wanted = "n, dim" if dim is None else f"n, {dim}"
        raise InputError(f"Vectors {list(vectors.shape)} of {vectors.dtype} were given; expected floats [{wanted}].")
    if dim is None and len(vectors) == 0:
        raise InputError("No vectors to learn from were given.")
    if not np.isfinite(vectors).all():
        raise InputError("The vectors hold numbers that are not finite.")
    return vectors.astype(np.float32, copy=False)


def _top(score: Callable[[np.ndarray], np.ndarray], queries: int, codes: np.ndarray, k: int) -> Found:
    """The best ``k`` for so many queries, block by block of documents."""
    k = min(k, len(codes))
    scores = np.empty((queries, 0), np.float32)
    rows = np.empty((queries, 0), np.int64)
    for start in range(0, len(codes), _BLOCK):
        here = score(codes[start : start + _BLOCK])
        scores = np.concatenate([scores, here], 1)
        rows = np.concatenate([rows, np.broadcast_to(np.arange(start, start + here.shape[1]), here.shape)], 1)
        if scores.shape[1] > k:
            best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
            scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
    order = np.argsort(-scores, axis=1, kind="stable")
    return Found(np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1))


def compress_vectors(
    vectors: np.ndarray,
    quantizer: Quantizer,
    queries: np.ndarray,
    *,
    k: int = 10,
    rescore: bool = False,
    oversample: int = 4,
    seed: int = 0,
) -> tuple[np.ndarray, Report]:
    """Codes of vectors, and how many of the exact nearest documents a search in them still finds.

    Args:
        vectors: ``[n, dim]`` documents.
        quantizer: is fitted on them if it has learnt nothing yet.
        queries: ``[queries, dim]`` such as will be asked.
        k: places compared.
        rescore: whether the search rescores with the vectors themselves, which then must be kept on disk.
        oversample: candidates a place, with ``rescore``.
        seed: of the interval's resampling of queries.

    Returns:
        Codes ``[n, width]`` and the report: bytes of a vector, and recall of the exact first ``k`` with its interval.

    Example:
        >>> from polyhead.compress import Int8Quantizer
        >>> vectors = np.random.default_rng(0).normal(size=(1000, 64)).astype(np.float32)
        >>> codes, report = compress_vectors(vectors, Int8Quantizer(), vectors[:50])
        >>> report.before.bytes_per_vector, report.after.bytes_per_vector
        (256, 64)
    """
    from polyhead.evaluate.statistics import bootstrap_interval

    vectors = checked(vectors)
    queries = checked(queries, vectors.shape[1])
    if not hasattr(quantizer, "dim_"):
        quantizer.fit(vectors)
    codes = quantizer.encode(vectors)
    exact = _top(lambda some: queries @ some.T, len(queries), vectors, k).rows
    given = quantizer.search(queries, codes, k, rescore=vectors if rescore else None, oversample=oversample)
    hits = (given.rows[:, :, None] == exact[:, None, :]).any(2).mean(1)
    recall = bootstrap_interval(hits, seed=seed)
    full = 4 * vectors.shape[1]
    details = {"quantizer": quantizer.name, "rescored": rescore, "oversample": oversample if rescore else 1}
    return codes, Report(
        Cost(bytes_per_vector=full),
        Cost(bytes_per_vector=quantizer.bytes_per_vector),
        quality=(1.0, recall.value),
        metric=f"recall of the exact first {k}",
        interval=(recall.low, recall.high),
        details=details | {"vectors": len(vectors), "queries": len(queries)},
    )
