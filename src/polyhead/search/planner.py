"""How a search is run: exactly in memory where the rows fit, else through the vector index. It says which it took."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.errors import InputError
from polyhead.search.faults import told
from polyhead.search.filters import COLUMNS, compile_filter
from polyhead.search.view import SPREAD_SAMPLE, spread_of, top_k

if TYPE_CHECKING:
    from polyhead.search.late.rows import LateRows
    from polyhead.search.store import Store

__all__ = ["ExactView", "IndexView", "SearchLimits", "StoredView", "open_view"]

RECORD_COLUMNS = [*COLUMNS, "attributes"]
REFINE = 10
LEAST_PROBES = 32


@dataclass(frozen=True)
class SearchLimits:
    """When rows are searched exactly in memory: at most ``exact_rows`` of them, in at most ``memory_bytes``."""

    exact_rows: int = 100_000
    memory_bytes: int = 1 << 30


def open_view(store: Store, where: str | None, limits: SearchLimits | None) -> StoredView:
    """Plan by how many rows pass the filter, and open the view that suits (see :meth:`Store.view`)."""
    limits = limits or SearchLimits()
    sql = compile_filter(where)
    table = store.snapshot()
    with told(store.uri, "read"):
        total = int(table.count_rows())
        matching = int(table.count_rows(sql)) if sql else total
    row_bytes = 4 * (store.meta.dim + store.meta.head_width)
    most = min(limits.exact_rows, limits.memory_bytes // row_bytes)
    if matching > most:
        return IndexView(store, table, where, sql, total)
    if sql is None or total > most:
        return _whole(store, table, where, sql, total)
    # The whole table fits: it is loaded once for all filters, and LanceDB says which rows pass this one.
    whole = _whole(store, table, None, None, total)
    return whole.subset(_row_ids(store, table, sql), where)


def _whole(store: Store, table: Any, where: str | None, sql: str | None, total: int) -> ExactView:
    """The exact view of all rows that pass ``sql``; the last two are kept with the store."""
    key, views = (int(table.version), sql), store.views
    if key not in views:
        row_ids, documents = _listed(store, table, sql, by_id=True)
        words = _exact_words(len(row_ids), total, where)
        view = ExactView(store, table, row_ids, documents, lambda name: _load(store, table, sql, name, row_ids), words)
        while len(views) >= 2:
            views.pop(next(iter(views)), None)
        views[key] = view
    return views[key]


def _exact_words(n: int, total: int, where: str | None) -> str:
    return f"exact scan of {n:,} of {total:,} rows in memory" + (f" ({where.strip()})" if where else "")


def _scan(table: Any, sql: str | None, columns: list[str]) -> Any:
    query = table.search().select(columns).with_row_id(True)
    return query.where(sql, prefilter=True) if sql else query


def _row_ids(store: Store, table: Any, sql: str | None) -> np.ndarray:
    with told(store.uri, "read"):
        return np.asarray(_scan(table, sql, ["size"]).to_arrow()["_rowid"].to_numpy())


def _listed(store: Store, table: Any, sql: str | None, *, by_id: bool) -> tuple[np.ndarray, np.ndarray]:
    """LanceDB's row ids ``[n]`` and document numbers ``[n]`` of rows that pass, in the order of ids or of row ids."""
    import pyarrow.compute as pc

    columns = ["id", "doc_id"] if by_id else ["doc_id"]
    with told(store.uri, "read"):
        found = _scan(table, sql, columns).to_arrow()
    found = found.take(pc.sort_indices(found["id" if by_id else "_rowid"]))
    documents = found["doc_id"].combine_chunks().dictionary_encode()
    if hasattr(documents, "chunks"):  # some versions of Arrow give one chunk, some the array
        documents = documents.combine_chunks() if len(documents.chunks) != 1 else documents.chunk(0)
    return found["_rowid"].to_numpy(), documents.indices.to_numpy().astype(np.int64)


def _load(store: Store, table: Any, sql: str | None, column: str, row_ids: np.ndarray) -> np.ndarray:
    """``[n, width]`` float32 of a vector column, read batch by batch into its place."""
    width = vector_width(store, column)
    matrix = np.empty((len(row_ids), width), dtype=np.float32)
    order = np.argsort(row_ids, kind="stable")
    ascending = row_ids[order]
    with told(store.uri, "read"):
        for batch in _scan(table, sql, [column]).to_batches():
            places = order[np.searchsorted(ascending, batch.column("_rowid").to_numpy())]
            matrix[places] = _vectors_of(batch.column(column), width)
    return matrix


def _vectors_of(column: Any, width: int) -> np.ndarray:
    """``[n, width]`` of an Arrow array of fixed-size lists, without copying."""
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(-1, width)


def vector_width(store: Store, column: str) -> int:
    """Numbers in a vector of ``column``; InputError where the index has no such vectors."""
    widths = {"dense": store.meta.dim, "heads": store.meta.head_width}
    if not widths.get(column):
        raise InputError(
            f"This index has no vectors '{column}', expected one of {[name for name in widths if widths[name]]}. "
            "An index made without head vectors can be made anew with --rebuild."
        )
    return widths[column]


class StoredView(ABC):
    """What the exact and the indexed view share: which rows they are, and their records.

    Row numbers follow the order of ids in an exact view, so that ties do not depend on how the table came about. A
    view stays at the version it was opened at. See :class:`polyhead.search.view.View`.
    """

    def __init__(self, store: Store, table: Any, row_ids: np.ndarray, documents: np.ndarray, plan: str) -> None:
        self.n = len(row_ids)
        self.documents = documents
        self.head_importance = store.meta.head_importance
        self.plan = plan
        self.late: LateRows | None = None
        self._store = store
        self._table = table
        self._row_ids = row_ids

    @cached_property
    def spread(self) -> float:
        """See :class:`polyhead.search.view.View`; measured once, on at most 2,000 rows."""
        rows = np.sort(np.random.default_rng(0).permutation(self.n)[:SPREAD_SAMPLE])
        return spread_of(self.vectors(rows, "dense"))

    @abstractmethod
    def nearest(self, queries: np.ndarray, column: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`polyhead.search.view.View`."""

    @abstractmethod
    def recall(self, queries: np.ndarray, column: str = "dense", k: int = 10) -> float:
        """Share of the true ``k`` nearest rows that :meth:`nearest` finds, over ``queries [m, d]``."""

    def vectors(self, rows: np.ndarray, column: str) -> np.ndarray:
        """See :class:`polyhead.search.view.View`."""
        width = vector_width(self._store, column)
        unique, inverse = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)
        if len(unique) == 0:
            return np.zeros((0, width), dtype=np.float32)
        taken = self._take(unique, [column])[column].combine_chunks()
        return _vectors_of(taken, width).astype(np.float32)[inverse]

    def fetch(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """See :class:`polyhead.search.view.View`; ``attributes`` are JSON text."""
        unique, inverse = np.unique(np.asarray(rows, dtype=np.int64), return_inverse=True)
        if len(unique) == 0:
            return []
        records = self._take(unique, RECORD_COLUMNS).select(RECORD_COLUMNS).to_pylist()
        return [dict(records[i]) for i in inverse]

    def row_keys(self) -> list[tuple[str, str]]:
        """Id and content hash of every row."""
        with told(self._store.uri, "read"):
            found = _scan(self._table, None, ["id", "content_hash"]).to_arrow()
        given = found["_rowid"].to_numpy()
        order = np.argsort(given, kind="stable")
        found = found.take(order[np.searchsorted(given[order], self._row_ids)])
        return list(zip(found["id"].to_pylist(), found["content_hash"].to_pylist(), strict=True))

    def _take(self, rows: np.ndarray, columns: list[str]) -> Any:
        """The columns of ``rows``, in their order (LanceDB gives them in its own)."""
        wanted = self._row_ids[rows]
        with told(self._store.uri, "read"):
            taken = self._table.take_row_ids(wanted.tolist()).select(columns).with_row_id().to_arrow()
        given = taken["_rowid"].to_numpy()
        order = np.argsort(given, kind="stable")
        return taken.take(order[np.searchsorted(given[order], wanted)])


class ExactView(StoredView):
    """Rows searched exactly in memory; vectors are loaded when first asked for.

    Both columns are held as float32: widening float16 for every query made one query 10 times slower.
    """

    def __init__(
        self,
        store: Store,
        table: Any,
        row_ids: np.ndarray,
        documents: np.ndarray,
        load: Callable[[str], np.ndarray],
        plan: str,
    ) -> None:
        super().__init__(store, table, row_ids, documents, plan)
        self._load = load
        self._columns: dict[str, np.ndarray] = {}

    def _column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            self._columns[name] = self._load(name)
        return self._columns[name]

    def nearest(self, queries: np.ndarray, column: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`polyhead.search.view.View`."""
        return top_k(queries, self._column(column), k)

    def recall(self, queries: np.ndarray, column: str = "dense", k: int = 10) -> float:
        """1.0: the search is exact."""
        return 1.0

    def vectors(self, rows: np.ndarray, column: str) -> np.ndarray:
        """See :class:`polyhead.search.view.View`."""
        return np.asarray(self._column(column)[np.asarray(rows, dtype=np.int64)])

    def subset(self, row_ids: np.ndarray, where: str | None) -> ExactView:
        """The view of those of its rows that have the given row ids of LanceDB."""
        order = np.argsort(self._row_ids, kind="stable")
        rows = np.sort(order[np.searchsorted(self._row_ids, row_ids, sorter=order)])
        words = _exact_words(len(rows), self.n, where)
        return ExactView(
            self._store,
            self._table,
            self._row_ids[rows],
            self.documents[rows],
            lambda name: self._column(name)[rows],
            words,
        )


class IndexView(StoredView):
    """Rows on disk, found through LanceDB's IVF_SQ index with exact refinement, filter first.

    Where no index was built yet LanceDB scans the table on disk: exact and slow. Row numbers follow LanceDB's order.
    """

    def __init__(self, store: Store, table: Any, where: str | None, sql: str | None, total: int) -> None:
        row_ids, documents = _listed(store, table, sql, by_id=False)
        super().__init__(store, table, row_ids, documents, "")
        self._sql = sql
        with told(store.uri, "read"):
            self._indexed = {column for index in table.list_indices() for column in index.columns}
        # A filter thins out every partition: to find k rows among those that pass, more of them must be read.
        partitions = max(1.0, total**0.5)
        self._probes = int(min(partitions, max(LEAST_PROBES, partitions / 8) * total / max(1, self.n)) + 0.5)
        how = (
            f"IVF_SQ, nprobes {self._probes}, refine {REFINE}"
            if "dense" in self._indexed
            else "scan on disk (no index)"
        )
        self.plan = f"{how}, {self.n:,} of {total:,} rows" + (f", prefilter {where.strip()}" if where else "")

    def nearest(self, queries: np.ndarray, column: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`polyhead.search.view.View`; which rows are found is approximate, their scores are exact."""
        return self._search(queries, column, k, exact=False)

    def recall(self, queries: np.ndarray, column: str = "dense", k: int = 10) -> float:
        """See :class:`StoredView`; the true nearest are found by a scan of the table on disk."""
        found, _ = self._search(queries, column, k, exact=False)
        true, _ = self._search(queries, column, k, exact=True)
        hits = sum(len(np.intersect1d(a, b[b >= 0])) for a, b in zip(found, true, strict=True))
        return float(hits / max(1, (true >= 0).sum()))

    def _search(self, queries: np.ndarray, column: str, k: int, *, exact: bool) -> tuple[np.ndarray, np.ndarray]:
        vector_width(self._store, column)
        rows = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        for i, query in enumerate(np.asarray(queries, dtype=np.float32)):
            search = self._table.search(query, vector_column_name=column).distance_type("dot").limit(min(k, self.n))
            if self._sql:
                search = search.where(self._sql, prefilter=True)
            if exact:
                search = search.bypass_vector_index()
            elif column in self._indexed:
                search = search.nprobes(self._probes).refine_factor(REFINE)
            with told(self._store.uri, "read"):
                found = search.select(["_distance"]).with_row_id(True).to_arrow()
            at = np.searchsorted(self._row_ids, found["_rowid"].to_numpy())
            score = 1.0 - found["_distance"].to_numpy()  # LanceDB's distance is one minus the inner product
            order = np.lexsort((at, -score))
            rows[i, : len(at)], scores[i, : len(at)] = at[order], score[order]
        return rows, scores
