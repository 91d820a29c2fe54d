"""What a strategy sees of an index: vectors to search, and the rows behind them."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from polyhead.search.heads import random_pairs

__all__ = ["ArrayView", "View", "spread_of", "top_k"]

SPREAD_SAMPLE = 2_000


class View(Protocol):
    """The rows of an index that pass a filter, as a strategy needs them. Row numbers run from 0 to ``n - 1``."""

    n: int
    documents: np.ndarray
    """``[n]`` int64: number of the document each row is a chunk of."""
    head_importance: np.ndarray | None
    """``[layers, heads]`` from :func:`polyhead.search.heads.head_statistics`, or None."""
    plan: str
    """How vectors are searched, in words."""

    @property
    def spread(self) -> float:
        """Standard deviation of the inner products of random pairs of dense vectors: the yardstick of similarity."""
        ...

    def nearest(self, queries: np.ndarray, column: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``[m, k]`` int64 and inner products ``[m, k]`` float32 for ``queries [m, d]``; best first, -1 pads."""
        ...

    def vectors(self, rows: np.ndarray, column: str) -> np.ndarray:
        """``[r, d]`` float32 of ``column`` ("dense" or "heads") at ``rows [r]``."""
        ...

    def fetch(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """The stored fields of ``rows`` (id, doc_id, path, text, start, end, ...), in that order."""
        ...


class ArrayView:
    """A view over arrays in memory, searched exactly.

    Args:
        dense: ``[n, dim]`` float32.
        heads: ``[n, layers * heads * head_dim]`` as :func:`polyhead.search.heads.prepare_heads` gives them, or None.
        documents: ``[n]`` document numbers; None where every row is its own document.
        head_importance: ``[layers, heads]`` or None.
        records: the stored fields of each row, or a function that fetches them by row numbers.
    """

    def __init__(
        self,
        dense: np.ndarray,
        heads: np.ndarray | None = None,
        *,
        documents: np.ndarray | None = None,
        head_importance: np.ndarray | None = None,
        records: Any = None,
        plan: str | None = None,
    ) -> None:
        self.n = len(dense)
        self._columns = {"dense": dense}
        if heads is not None:
            self._columns["heads"] = heads
        self.documents = np.arange(self.n) if documents is None else documents
        self.head_importance = head_importance
        self._records = records
        self.plan = plan or f"exact scan of {self.n:,} rows in memory"
        self._spread: float | None = None

    @property
    def spread(self) -> float:
        """See :class:`View`; measured once on at most 2,000 rows."""
        if self._spread is None:
            self._spread = spread_of(self._columns["dense"])
        return self._spread

    def nearest(self, queries: np.ndarray, column: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`View`."""
        return top_k(queries, self._columns[column], k)

    def vectors(self, rows: np.ndarray, column: str) -> np.ndarray:
        """See :class:`View`."""
        return np.asarray(self._columns[column][rows], dtype=np.float32)

    def fetch(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """See :class:`View`."""
        if callable(self._records):
            return self._records(rows)
        return [dict(self._records[int(row)]) if self._records is not None else {} for row in rows]


def spread_of(dense: np.ndarray, *, seed: int = 0) -> float:
    """Standard deviation of inner products between random pairs of rows of ``dense [n, dim]``; 0 below two rows."""
    if len(dense) < 2:
        return 0.0
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.permutation(len(dense))[:SPREAD_SAMPLE])
    sample = np.asarray(dense[rows], dtype=np.float32)
    left, right = random_pairs(len(sample), 20_000, seed)
    return float(np.einsum("pd,pd->p", sample[left], sample[right]).std())


def top_k(queries: np.ndarray, matrix: np.ndarray, k: int, *, block: int = 16_384) -> tuple[np.ndarray, np.ndarray]:
    """Exact ``k`` largest inner products of ``queries [m, d]`` with the rows of ``matrix [n, d]``.

    Scans in blocks of rows, so memory is bounded by ``m * (block + k)``; a float16 matrix is widened block by block.

    Returns:
        rows ``[m, k]`` int64, best first, ties to the lower row, -1 where there are fewer than ``k`` rows; and scores
        ``[m, k]`` float32, ``-inf`` there.
    """
    m, n = len(queries), len(matrix)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    kept_rows = np.full((m, 0), -1, dtype=np.int64)
    kept_scores = np.zeros((m, 0), dtype=np.float32)
    for start in range(0, n, block):
        scores = queries @ np.asarray(matrix[start : start + block], dtype=np.float32).T
        take = min(k, scores.shape[1])
        if take < scores.shape[1]:
            found = np.argpartition(-scores, take - 1, axis=1)[:, :take]
            scores = np.take_along_axis(scores, found, 1)
        else:
            found = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
        kept_rows = np.concatenate([kept_rows, found + start], axis=1)
        kept_scores = np.concatenate([kept_scores, scores], axis=1)
        if kept_rows.shape[1] > 8 * k:
            kept_rows, kept_scores = _best(kept_rows, kept_scores, k)
    rows, scores = _best(kept_rows, kept_scores, k)
    missing = k - rows.shape[1]
    if missing > 0:
        rows = np.pad(rows, ((0, 0), (0, missing)), constant_values=-1)
        scores = np.pad(scores, ((0, 0), (0, missing)), constant_values=-np.inf)
    return rows, scores


def _best(rows: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(rows, order, 1), np.take_along_axis(scores, order, 1)
