"""Rows on disk: a LanceDB table of chunks, one of files, and what the index was made with.

The same code serves a local folder and an object store (``s3://bucket/index`` with ``storage_options``). LanceDB
commits a change by one atomic swap of its manifest, so a process killed at any moment leaves the last committed
version. Rows are upserted by a primary key; without one, two writers of the same new rows would both add them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from polyhead.errors import IndexMismatchError, InputError
from polyhead.search.filters import parse_filter, quote
from polyhead.search.planner import ANN_ROWS, ApproximateView
from polyhead.search.view import ArrayView, View

__all__ = ["FORMAT_VERSION", "IndexMeta", "Store"]

FORMAT_VERSION = 1
TEXT_COLUMNS = (
    "id",
    "doc_id",
    "path",
    "title",
    "heading",
    "kind",
    "size",
    "modified",
    "start",
    "end",
    "text",
    "attributes",
)
KEPT_VERSIONS = timedelta(hours=1)


@dataclass
class IndexMeta:
    """What an index was made with; rows and questions are comparable only under the same.

    Attributes:
        model: as it was asked for.
        fingerprint: of the encoder's files and settings.
        dim: of the dense vectors.
        head_shape: ``(layers, heads, head_dim)``.
        head_mean: ``[layers, heads, head_dim]``; fixed by the first rows, so that later rows stay comparable.
        head_importance: ``[layers, heads]`` of the same rows.
        settings: how documents were read and cut.
    """

    model: str
    fingerprint: str
    dim: int
    head_shape: tuple[int, int, int]
    head_mean: np.ndarray
    head_importance: np.ndarray
    settings: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """One line of JSON; floats keep every digit of float32."""
        plain = asdict(self)
        plain["head_mean"] = np.asarray(self.head_mean, dtype=np.float32).tolist()
        plain["head_importance"] = np.asarray(self.head_importance, dtype=np.float32).tolist()
        return json.dumps(plain)

    @classmethod
    def from_json(cls, text: str) -> IndexMeta:
        """The inverse of :meth:`to_json`."""
        plain = json.loads(text)
        plain["head_shape"] = tuple(plain["head_shape"])
        plain["head_mean"] = np.array(plain["head_mean"], dtype=np.float32)
        plain["head_importance"] = np.array(plain["head_importance"], dtype=np.float32)
        return cls(**plain)


def _chunk_schema(dim: int, head_width: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("doc_id", pa.string(), nullable=False),
            pa.field("path", pa.string(), nullable=False),
            pa.field("title", pa.string()),
            pa.field("heading", pa.string()),
            pa.field("kind", pa.string()),
            pa.field("size", pa.int64()),
            pa.field("modified", pa.timestamp("us", tz="UTC")),
            pa.field("start", pa.int64()),
            pa.field("end", pa.int64()),
            pa.field("text", pa.string()),
            pa.field("attributes", pa.string()),
            pa.field("file_hash", pa.string(), nullable=False),
            pa.field("dense", pa.list_(pa.float32(), dim)),
            pa.field("heads", pa.list_(pa.float16(), head_width)),
        ]
    )


FILE_SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("size", pa.int64()),
        pa.field("mtime_ns", pa.int64()),
        pa.field("file_hash", pa.string()),
        pa.field("documents", pa.int64()),
        pa.field("chunks", pa.int64()),
        pa.field("error", pa.string()),
    ]
)
META_SCHEMA = pa.schema([pa.field("key", pa.string(), nullable=False), pa.field("value", pa.string())])


class Store:
    """The tables of one index.

    Args:
        uri: a local folder or an object-store address that LanceDB understands.
        storage_options: credentials and endpoint of an object store.
    """

    def __init__(self, uri: str, *, storage_options: dict[str, str] | None = None) -> None:
        import lancedb

        self.uri = str(uri)
        # Readers must see what other processes commit; LanceDB's default is never to look.
        self._db = lancedb.connect(self.uri, storage_options=storage_options, read_consistency_interval=timedelta(0))
        self._tables: dict[str, Any] = {}
        self._views: dict[tuple[int, str | None], View] = {}

    def _names(self) -> set[str]:
        names: set[str] = set()
        token = None
        while True:
            page = self._db.list_tables(page_token=token)
            names.update(page.tables)
            token = page.page_token
            if not token:
                return names

    def exists(self) -> bool:
        """Whether an index was completely created here."""
        return {"chunks", "files", "meta"} <= self._names() and self._table("meta").count_rows() > 0

    def create(self, meta: IndexMeta) -> None:
        """Make the tables; whatever a killed creation left is replaced. The meta row is written last: it commits."""
        layers, heads, head_dim = meta.head_shape
        for name, schema, key in (
            ("chunks", _chunk_schema(meta.dim, layers * heads * head_dim), "id"),
            ("files", FILE_SCHEMA, "path"),
            ("meta", META_SCHEMA, "key"),
        ):
            table = self._db.create_table(name, schema=schema, mode="overwrite")
            table.set_unenforced_primary_key(key)
            self._tables[name] = table
        row = pa.table({"key": ["index"], "value": [meta.to_json()]}, schema=META_SCHEMA)
        self._upsert("meta", "key", row)

    def drop(self) -> None:
        """Remove every table of the index."""
        for name in self._names() & {"chunks", "files", "meta"}:
            self._db.drop_table(name)
        self._tables.clear()
        self._views.clear()

    @property
    def meta(self) -> IndexMeta:
        """What the index was made with.

        Raises:
            IndexMismatchError: an index of another format version.
        """
        rows = self._table("meta").search().where("key = 'index'").limit(1).to_arrow().to_pylist()
        if not rows:
            raise InputError(f"'{self.uri}' holds no index. Make one with: polyhead index PATH --index {self.uri}")
        version = json.loads(rows[0]["value"]).get("format_version")
        if version != FORMAT_VERSION:
            raise IndexMismatchError(
                f"The index at '{self.uri}' has format {version}, this Polyhead reads format {FORMAT_VERSION}. "
                "Make it again with: polyhead index PATH --rebuild"
            )
        return IndexMeta.from_json(rows[0]["value"])

    def _table(self, name: str) -> Any:
        if name not in self._tables:
            self._tables[name] = self._db.open_table(name)
        return self._tables[name]

    def _upsert(self, name: str, key: str, rows: pa.Table) -> None:
        merge = self._table(name).merge_insert(key)
        merge.when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def upsert_chunks(self, columns: dict[str, Any], dense: np.ndarray, heads: np.ndarray) -> None:
        """Write chunk rows, replacing those with the same id.

        Args:
            columns: lists of the schema's plain columns.
            dense: ``[n, dim]``.
            heads: ``[n, layers * heads * head_dim]`` as ``prepare_heads`` gives them; kept as float16.
        """
        schema = self._table("chunks").schema
        columns = dict(columns)
        columns["dense"] = _fixed_size_list(dense.astype(np.float32))
        columns["heads"] = _fixed_size_list(heads.astype(np.float16))
        self._upsert("chunks", "id", pa.table({name: columns[name] for name in schema.names}, schema=schema))

    def delete_stale_chunks(self, paths: Sequence[str], hashes: Sequence[str]) -> None:
        """Delete chunks of ``paths`` that come from other contents than ``hashes`` (none given: all their chunks)."""
        for start in range(0, len(paths), 500):
            some = paths[start : start + 500]
            where = f"path IN ({', '.join(map(quote, some))})"
            if hashes:
                keep = hashes[start : start + 500]
                where += f" AND file_hash NOT IN ({', '.join(map(quote, keep))})"
            self._table("chunks").delete(where)

    def files(self) -> dict[str, dict[str, Any]]:
        """The file rows by path."""
        return {row["path"]: row for row in self._table("files").to_arrow().to_pylist()}

    def upsert_files(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write file rows, replacing those with the same path."""
        if rows:
            self._upsert("files", "path", pa.Table.from_pylist(list(rows), schema=FILE_SCHEMA))

    def delete_files(self, paths: Sequence[str]) -> None:
        """Delete file rows."""
        for start in range(0, len(paths), 500):
            self._table("files").delete(f"path IN ({', '.join(map(quote, paths[start : start + 500]))})")

    def written_documents(self) -> dict[tuple[str, str], set[str]]:
        """Ids of the documents that have chunks, by path and file hash: what a killed run had already written."""
        table = self._table("chunks").search().select(["path", "file_hash", "doc_id"]).limit(None).to_arrow()
        found: dict[tuple[str, str], set[str]] = {}
        for path, file_hash, doc_id in zip(*(table[name].to_pylist() for name in table.column_names[:3]), strict=True):
            found.setdefault((path, file_hash), set()).add(doc_id)
        return found

    def count(self, where: str | None = None) -> int:
        """Chunks that pass a filter in the user's language."""
        return int(self._table("chunks").count_rows(parse_filter(where) if where else None))

    def optimize(self) -> None:
        """Compact small writes, drop old versions; above ``ANN_ROWS`` chunks, bring the vector indexes up to date."""
        for name in ("chunks", "files"):
            self._table(name).optimize(cleanup_older_than=KEPT_VERSIONS)
        chunks = self._table("chunks")
        if chunks.count_rows() <= ANN_ROWS or chunks.list_indices():
            return
        for column in ("dense", "heads"):
            # Never the default IVF_PQ: its recall@10 was 0.52 where IVF_SQ with refinement had 1.00.
            chunks.create_index(metric="dot", vector_column_name=column, index_type="IVF_SQ")
        for column in ("id", "path", "kind", "size", "modified"):
            chunks.create_scalar_index(column)

    def view(self, where: str | None = None, *, exact_rows: int = ANN_ROWS) -> View:
        """The rows that pass ``where``, ready to search; kept in memory until the table changes.

        Args:
            where: a filter, see :func:`polyhead.search.filters.parse_filter`; None for all rows.
            exact_rows: up to this many rows are scanned exactly in memory, more are searched through the index.
        """
        table = self._table("chunks")
        key = (int(table.version), where)
        if key not in self._views:
            self._views = {known: view for known, view in self._views.items() if known[0] == key[0]}
            self._views[key] = self._load(table, where, exact_rows)
        return self._views[key]

    def _load(self, table: Any, where: str | None, exact_rows: int) -> View:
        condition = parse_filter(where) if where else None
        total = table.count_rows()
        passing = total if condition is None else table.count_rows(condition)
        importance = self.meta.head_importance
        suffix = f" where {where}" if where else ""
        exact = passing <= exact_rows
        columns = ["id", "doc_id", *(["dense", "heads"] if exact else [])]
        query = table.search().select(columns).with_row_id(True).limit(None)
        rows = (query.where(condition, prefilter=True) if condition else query).to_arrow()
        _, documents = np.unique(rows["doc_id"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
        row_ids = rows["_rowid"].to_numpy()

        def fetch(positions: np.ndarray) -> list[dict[str, Any]]:
            return _fetch(table, row_ids, positions)

        if exact:
            return ArrayView(
                _matrix(rows["dense"]),
                _matrix(rows["heads"]),
                documents=documents,
                head_importance=importance,
                records=fetch,
                plan=f"exact scan of {passing:,} of {total:,} rows in memory{suffix}",
            )
        return ApproximateView(table, row_ids, documents, condition, importance, fetch, f"of {total:,} rows{suffix}")


def _fetch(table: Any, row_ids: np.ndarray, positions: np.ndarray) -> list[dict[str, Any]]:
    if len(positions) == 0:
        return []
    wanted = [int(row_ids[position]) for position in positions]
    found = table.take_row_ids(wanted).select(list(TEXT_COLUMNS)).with_row_id(True).to_arrow().to_pylist()
    by_id = {row.pop("_rowid"): row for row in found}
    return [by_id[row_id] for row_id in wanted]


def _fixed_size_list(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A fixed-size-list column as one array, without a Python object per row."""
    width = column.type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, width) for chunk in column.chunks]
    dtype = column.type.value_type.to_pandas_dtype()
    return np.concatenate(parts) if parts else np.zeros((0, width), dtype=dtype)
