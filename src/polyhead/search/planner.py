"""Above what fits an exact scan: LanceDB's IVF_SQ index with refinement, filters applied before the search."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from polyhead.search.view import spread_of, top_k

__all__ = ["ANN_ROWS", "ApproximateView"]

ANN_ROWS = 100_000
"""Rows up to which an exact scan in memory is as fast as the index (``benchmarks/search.py``)."""

PROBES, REFINE = 20, 10


class ApproximateView:
    """A view searched through the vector index of a LanceDB table; see :class:`polyhead.search.view.View`.

    Scores are exact inner products: the index brings candidates, refined against the full vectors.
    """

    def __init__(
        self,
        table: Any,
        row_ids: np.ndarray,
        documents: np.ndarray,
        condition: str | None,
        head_importance: np.ndarray | None,
        fetch: Callable[[np.ndarray], list[dict[str, Any]]],
        words: str,
    ) -> None:
        self.n = len(row_ids)
        self.documents = documents
        self.head_importance = head_importance
        self.fetch = fetch
        self.plan = f"IVF_SQ over {self.n:,} {words}, {PROBES} probes, refine {REFINE}"
        self._table = table
        self._row_ids = row_ids
        self._order = np.argsort(row_ids)
        self._condition = condition
        self._spread: float | None = None

    @property
    def spread(self) -> float:
        """See :class:`polyhead.search.view.View`; measured once on 2,000 random rows."""
        if self._spread is None:
            rows = np.random.default_rng(0).permutation(self.n)[:2_000]
            self._spread = spread_of(self.vectors(rows, "dense"))
        return self._spread

    def nearest(self, queries: np.ndarray, column: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`polyhead.search.view.View`."""
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for number, query in enumerate(queries):
            search = self._table.search(query.astype(np.float32), vector_column_name=column).distance_type("dot")
            search = search.nprobes(PROBES).refine_factor(REFINE).select(["id", "_distance"]).with_row_id(True)
            if self._condition:
                search = search.where(self._condition, prefilter=True)
            found = search.limit(k).to_arrow()
            positions = self._positions(found["_rowid"].to_numpy())
            rows[number, : len(positions)] = positions
            # LanceDB's dot distance is 1 - inner product.
            scores[number, : len(positions)] = 1.0 - found["_distance"].to_numpy()
        return rows, scores

    def vectors(self, rows: np.ndarray, column: str) -> np.ndarray:
        """See :class:`polyhead.search.view.View`."""
        if len(rows) == 0:
            return np.zeros((0, self._table.schema.field(column).type.list_size), dtype=np.float32)
        wanted = self._row_ids[rows]
        found = self._table.take_row_ids(wanted.tolist()).select([column]).with_row_id(True).to_arrow()
        width = found[column].type.list_size
        values = np.concatenate(
            [c.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for c in found[column].chunks]
        )
        got = found["_rowid"].to_numpy()
        order = np.argsort(got)
        return values[order[np.searchsorted(got[order], wanted)]].astype(np.float32)

    def recall(self, queries: np.ndarray, k: int = 10, column: str = "dense") -> float:
        """Measured recall@k of the index against an exact scan, the mean over ``queries [m, d]``."""
        everything = self.vectors(np.arange(self.n), column)
        exact, _ = top_k(queries, everything, k)
        found, _ = self.nearest(queries, column, k)
        return float(np.mean([len(set(a) & set(b)) / k for a, b in zip(exact.tolist(), found.tolist(), strict=True)]))

    def _positions(self, row_ids: np.ndarray) -> np.ndarray:
        return self._order[np.searchsorted(self._row_ids[self._order], row_ids)]
