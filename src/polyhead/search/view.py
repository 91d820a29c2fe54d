"""What a strategy sees of an index: vectors to search, and the rows behind them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from polyhead.search.heads import random_pairs

if TYPE_CHECKING:
    from polyhead.search.late.rows import LateRows

__all__ = ["ArrayView", "View", "spread_of", "top_k"]

SPREAD_SAMPLE = 2_000
SCORES_AT_ONCE = 1 << 24
WIDENED_ROWS = 1 << 13
GROUP = 64


class View(Protocol):
    """The rows of an index that pass a filter, as a strategy needs them. Row numbers run from 0 to ``n - 1``."""

    @property
    def n(self) -> int:
        """How many rows pass the filter."""
        ...

    @property
    def documents(self) -> np.ndarray:
        """``[n]`` int64: number of the document each row is a chunk of."""
        ...

    @property
    def head_importance(self) -> np.ndarray | None:
        """``[layers, heads]`` from :func:`polyhead.search.heads.head_statistics`, or None."""
        ...

    @property
    def plan(self) -> str:
        """How vectors are searched, in words."""
        ...

    @property
    def spread(self) -> float:
        """Standard deviation of the inner products of random pairs of dense vectors: the yardstick of similarity."""
        ...

    @property
    def late(self) -> LateRows | None:
        """The token vectors of the rows, or None where they were not asked for."""
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
        late: token vectors of the rows, or None.
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
        late: LateRows | None = None,
    ) -> None:
        self.n = len(dense)
        self.late = late
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


def top_k(queries: np.ndarray, matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact ``k`` largest inner products of ``queries [m, d]`` with the rows of ``matrix [n, d]``.

    Scans in blocks, so that at most ``SCORES_AT_ONCE`` scores are held; a matrix that is not float32 is widened block
    by block (about ten times slower than float32 for one query).

    Returns:
        rows ``[m, k]`` int64, best first, ties to the lower row, -1 where there are fewer than ``k`` rows; and scores
        ``[m, k]`` float32, ``-inf`` there.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    m, n = len(queries), len(matrix)
    rows = np.full((m, k), -1, dtype=np.int64)
    best = np.full((m, k), -np.inf, dtype=np.float32)
    step = SCORES_AT_ONCE // WIDENED_ROWS
    for first in range(0, m, step):
        some = slice(first, first + step)
        width = SCORES_AT_ONCE // len(queries[some]) if matrix.dtype == np.float32 else WIDENED_ROWS
        for start in range(0, n, width):
            block = np.asarray(matrix[start : start + width], dtype=np.float32)
            _keep_best(queries[some] @ block.T, start, rows[some], best[some])
    return rows, best


def _keep_best(scores: np.ndarray, start: int, rows: np.ndarray, best: np.ndarray) -> None:
    """Merge ``scores [m, width]`` of the rows from ``start`` on into ``rows`` and ``best`` ``[m, k]``, in place."""
    k = rows.shape[1]
    least = _lower_bounds(scores, k)
    for i, line in enumerate(scores):
        # Everything that reaches the bound is kept, ties included: then ties fall to the lower row for certain.
        found = np.flatnonzero(line >= max(least[i], best[i, -1])) if k else np.zeros(0, np.int64)
        held = rows[i] >= 0
        all_rows = np.concatenate([rows[i][held], found + start])
        all_scores = np.concatenate([best[i][held], line[found]])
        order = np.lexsort((all_rows, -all_scores))[:k]
        rows[i, : len(order)], best[i, : len(order)] = all_rows[order], all_scores[order]


def _lower_bounds(scores: np.ndarray, k: int) -> np.ndarray:
    """``[m]`` numbers that at least ``k`` of each line of ``scores [m, width]`` reach, and few more than that."""
    width = scores.shape[1]
    if k == 0 or k >= width:
        return np.full(len(scores), -np.inf, dtype=np.float32)
    groups = width // GROUP
    if groups < 4 * k:
        return np.partition(scores, width - k, axis=1)[:, width - k]
    # k groups whose maximum reaches the bound hold at least k scores that do: one pass, then a small partition.
    maxima = scores[:, : groups * GROUP].reshape(len(scores), groups, GROUP).max(2)
    return np.partition(maxima, groups - k, axis=1)[:, groups - k]
