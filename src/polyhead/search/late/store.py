"""Token vectors of an index, durably: a table beside the chunks that is brought up to date with them."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from polyhead.embed.tokens import TokenVectors
from polyhead.errors import InputError
from polyhead.search.faults import told
from polyhead.search.filters import is_one_of
from polyhead.search.late.muvera import FDEEncoder, default_encoder
from polyhead.search.late.words import token_text
from polyhead.search.schema import fixed_size_lists
from polyhead.search.view import top_k

if TYPE_CHECKING:
    from polyhead.embed import Encoder
    from polyhead.search.planner import StoredView
    from polyhead.search.store import Store

__all__ = ["Precision", "StoredLate", "TokenReport", "TokenStore"]

Precision = Literal["float16", "int8"]
TOKENS = "tokens"
FORMAT_VERSION = 1
BATCH_ROWS = 256
COMMITS_BEFORE_OPTIMIZE = 20
MEMORY_BYTES = 1 << 30
_META_KEY = b"polyhead-tokens"
_PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}


@dataclass
class TokenReport:
    """What bringing token vectors up to date did, in rows: ``encoded`` anew, ``removed``, and the ``total`` now."""

    encoded: int = 0
    removed: int = 0
    total: int = 0


class TokenStore:
    """The table ``tokens`` of an index. Each commit is atomic; a row belongs to a chunk by id and content hash.

    It depends on nothing but the chunks: whatever a kill leaves, the next :meth:`update` makes up for, and rows
    whose chunk is gone or another are never read.

    Args:
        store: the index it belongs to.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._table: Any = None
        self._cached: tuple[int, np.ndarray] | None = None
        self._encoder: tuple[bytes, FDEEncoder] | None = None
        self._level: tuple[int, int] | None = None  # versions of chunks and tokens that are known to agree
        self._last: tuple[StoredView, int, StoredLate] | None = None

    def exists(self) -> bool:
        """Whether there are token vectors of this index's model (those of a model before a rebuild do not count)."""
        if self._table is None and TOKENS in self._store.table_names():
            with told(self._store.uri, "opened"):
                self._table = self._store.connection.open_table(TOKENS)
        return self._table is not None and self.meta["fingerprint"] == self._store.meta.fingerprint

    @property
    def meta(self) -> dict[str, Any]:
        """Format version, fingerprint of the model, dim, precision, settings and sample of the encodings."""
        return dict(json.loads((self._table.schema.metadata or {})[_META_KEY]))

    @property
    def encoder(self) -> FDEEncoder:
        """Makes this index's encodings."""
        packed = (self._table.schema.metadata or {})[_META_KEY]
        if self._encoder is None or self._encoder[0] != packed:
            self._encoder = packed, _encoder(self.meta)
        return self._encoder[1]

    # Writing ------------------------------------------------------------------------------------------------------

    def outdated(self) -> bool:
        """Whether chunks came, changed or left since the last :meth:`update`."""
        versions = (self._store.version, int(self._table.version)) if self.exists() else None
        if versions is not None and versions == self._level:
            return False
        if any(self._differences()):
            return True
        self._level = versions
        return False

    def report(self) -> TokenReport:
        """What an update with nothing to do reports."""
        return TokenReport(total=int(self._table.count_rows()))

    def update(
        self,
        encoder: Encoder,
        *,
        precision: Precision = "float16",
        progress: Callable[[int, int | None], None] | None = None,
    ) -> TokenReport:
        """Encode the tokens of new and changed chunks, and remove those of chunks that are gone; commits in batches.

        Args:
            encoder: the one the index was made with (the caller checks that).
            precision: of the vectors where the table is made; it stays what it is after that.
            progress: called with chunks done and to do.
        """
        if precision not in ("float16", "int8"):
            raise InputError(f"precision is {precision!r}, expected 'float16' or 'int8'.")
        to_do, gone = self._differences()
        if gone:
            self._store.delete_rows(self._table, "id", gone)
        report = TokenReport(removed=len(gone))
        for start in range(0, len(to_do), BATCH_ROWS):
            self._encode(to_do[start : start + BATCH_ROWS], encoder, precision)
            report.encoded += len(to_do[start : start + BATCH_ROWS])
            if progress is not None:
                progress(report.encoded, len(to_do))
        if self._table is not None:
            report.total = int(self._table.count_rows())
            self._tidy()
        return report

    def _differences(self) -> tuple[list[str], list[str]]:
        """Ids of chunks to encode, and ids of rows to remove."""
        wanted = _by_id(self._store.rows(["id", "content_hash"]))
        have = _by_id(self._scan(["id", "content_hash"]).to_arrow()) if self.exists() else {}
        return [one for one in wanted if have.get(one) != wanted[one]], [one for one in have if one not in wanted]

    def _encode(self, ids: Sequence[str], encoder: Encoder, precision: Precision) -> None:
        chunks = self._store.rows(["id", "content_hash", "title", "start", "text"], is_one_of("id", ids)).to_pylist()
        encoded = encoder.encode_tokens([token_text(row["title"], row["start"], row["text"]) for row in chunks])
        if not self.exists():
            self._create(encoded.vectors, precision)
        rows = _rows(chunks, encoded, self.meta, self.encoder)
        self._store.merge_rows(self._table, "id", rows)

    def _create(self, first: np.ndarray, precision: Precision) -> None:
        """Make the table; the first token vectors fix the sample that encodings are measured by."""
        encoder = default_encoder(first.shape[1])
        sample = encoder.fit(first.astype(np.float16)).sample_ if len(first) else None
        meta = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self._store.meta.fingerprint,
            "dim": encoder.dim,
            "precision": precision,
            "encodings": encoder.settings,
            "sample": None if sample is None else base64.b64encode(sample.astype("<f2").tobytes()).decode(),
        }
        again = TOKENS in self._store.table_names()
        with told(self._store.uri, "written"):
            self._table = self._store.connection.create_table(
                TOKENS, schema=_schema(meta), mode="overwrite" if again else "create"
            )

    def _tidy(self) -> None:
        from datetime import timedelta

        with told(self._store.uri, "written"):
            if self._table.stats()["fragment_stats"]["num_small_fragments"] >= COMMITS_BEFORE_OPTIMIZE:
                self._table.optimize(cleanup_older_than=timedelta(days=1))

    # Reading ------------------------------------------------------------------------------------------------------

    def _scan(self, columns: list[str], table: Any = None) -> Any:
        with told(self._store.uri, "read"):
            return (self._table if table is None else table).search().select(columns).with_row_id(True)

    def view(self, view: StoredView) -> StoredLate:
        """The token vectors of a view's rows at this moment; later writes do not change it."""
        if not self.exists():
            raise InputError(
                f"The index {self._store.uri} has no token vectors. Make them with: polyhead index PATH --tokens, or "
                "Index.update_tokens(encoder)."
            )
        version = int(self._table.version)
        if self._last is None or self._last[0] is not view or self._last[1] != version:
            self._last = view, version, StoredLate(self, view)
        return self._last[2]

    def snapshot(self) -> Any:
        """A handle on the table that stays at its newest version."""
        with told(self._store.uri, "read"):
            return self._store.connection.open_table(TOKENS, version=self._table.version)

    def held_encodings(self, table: Any, order: np.ndarray) -> np.ndarray:
        """``[rows, size]`` float32 of all rows, by ascending row id ``order``; kept for the next view."""
        version = int(table.version)
        if self._cached is None or self._cached[0] != version:
            matrix = np.empty((len(order), self.encoder.size), dtype=np.float32)
            for rows, block in self.encoding_blocks(table, order):
                matrix[rows] = block
            self._cached = version, matrix
        return self._cached[1]

    def encoding_blocks(self, table: Any, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places in ``order`` (ascending row ids) and their encodings, batch by batch from disk."""
        size = self.encoder.size
        with told(self._store.uri, "read"):
            for batch in self._scan(["encoding"], table).to_batches():
                flat = batch.column("encoding").flatten().to_numpy(zero_copy_only=False)
                yield np.searchsorted(order, batch.column("_rowid").to_numpy()), flat.reshape(-1, size)

    @property
    def uri(self) -> str:
        """Of the index."""
        return self._store.uri


class StoredLate:
    """Token vectors of the rows of a :class:`polyhead.search.planner.StoredView`; see :class:`LateRows`."""

    def __init__(self, store: TokenStore, view: StoredView) -> None:
        self._store = store
        self._table = store.snapshot()
        self.encoder = store.encoder
        known = store._scan(["id", "content_hash"], self._table).to_arrow().sort_by("_rowid")
        self._order = known["_rowid"].to_numpy()
        place = {
            key: at
            for at, key in enumerate(zip(known["id"].to_pylist(), known["content_hash"].to_pylist(), strict=True))
        }
        # [rows of the view]: place in the order of row ids, -1 for a chunk whose content has no token vectors.
        self._place = np.array([place.get(key, -1) for key in view.row_keys()], dtype=np.int64)
        self._rows = np.flatnonzero(self._place >= 0)
        self._row_at = np.full(len(self._order), -1, dtype=np.int64)
        self._row_at[self._place[self._rows]] = self._rows
        self._in_memory = 4 * len(self._order) * self.encoder.size <= MEMORY_BYTES
        left = len(self._place) - len(self._rows)
        how = "in memory" if self._in_memory else "on disk"
        self.plan = f"exact scan of {len(self._rows):,} encodings of {self.encoder.size:,} numbers {how}" + (
            f"; {left:,} chunks have no token vectors and were not looked at" if left else ""
        )

    def nearest(self, encoding: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`polyhead.search.late.rows.LateRows`."""
        count = min(count, len(self._rows))
        if self._in_memory:
            held = self._store.held_encodings(self._table, self._order)
            every = len(self._rows) == len(held)
            places, scores = top_k(encoding[None], held if every else held[self._place[self._rows]], count)
            return (self._row_at[places[0]] if every else self._rows[places[0]]), scores[0]
        rows, best = np.zeros(0, np.int64), np.zeros(0, np.float32)
        for places, block in self._store.encoding_blocks(self._table, self._order):
            ours = self._row_at[places] >= 0
            rows = np.concatenate([rows, self._row_at[places[ours]]])
            best = np.concatenate([best, block[ours].astype(np.float32) @ encoding])
            keep = np.lexsort((rows, -best))[:count]
            rows, best = rows[keep], best[keep]
        return rows, best

    def tokens(self, rows: np.ndarray) -> TokenVectors:
        """See :class:`polyhead.search.late.rows.LateRows`; rows without token vectors have none."""
        there = self._place[rows] >= 0
        wanted = self._order[self._place[rows[there]]]
        meta = self._store.meta
        columns = ["vectors", "spans", *(["scales"] if meta["precision"] == "int8" else [])]
        lengths = np.zeros(len(rows), dtype=np.int64)
        if not len(wanted):
            return TokenVectors(np.zeros((0, meta["dim"]), np.float16), np.zeros(len(rows) + 1, np.int64))
        with told(self._store.uri, "read"):
            taken = self._table.take_row_ids(np.unique(wanted).tolist()).select(columns).with_row_id().to_arrow()
        given = taken["_rowid"].to_numpy()
        order = np.argsort(given, kind="stable")
        taken = taken.take(order[np.searchsorted(given[order], wanted)]).combine_chunks()
        vectors = taken["vectors"].combine_chunks()
        lengths[there] = np.diff(vectors.offsets.to_numpy())
        flat = vectors.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, meta["dim"])
        if meta["precision"] == "int8":
            scales = taken["scales"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            flat = flat.astype(np.float32) * scales[:, None]
        spans = taken["spans"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return TokenVectors(flat, offsets, spans.reshape(-1, 2).astype(np.int64))


def _encoder(meta: dict[str, Any]) -> FDEEncoder:
    encoder = FDEEncoder(**meta["encodings"])
    if meta["sample"] is None:
        return encoder
    sample = np.frombuffer(base64.b64decode(meta["sample"]), "<f2").reshape(-1, encoder.dim)
    return encoder.fit(sample, count=len(sample))


def _by_id(table: pa.Table) -> dict[str, str]:
    return dict(zip(table["id"].to_pylist(), table["content_hash"].to_pylist(), strict=True))


def _schema(meta: dict[str, Any]) -> pa.Schema:
    number = pa.int8() if meta["precision"] == "int8" else pa.float16()
    fields = [
        pa.field("id", pa.string(), nullable=False, metadata=_PRIMARY_KEY),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("vectors", pa.list_(pa.list_(number, meta["dim"]))),
        pa.field("spans", pa.list_(pa.int32())),
        pa.field("encoding", pa.list_(pa.float16(), _encoder(meta).size)),
    ]
    if meta["precision"] == "int8":
        fields.append(pa.field("scales", pa.list_(pa.float32())))
    return pa.schema(fields, metadata={_META_KEY: json.dumps(meta).encode()})


def _rows(chunks: list[dict[str, Any]], encoded: TokenVectors, meta: dict[str, Any], encoder: FDEEncoder) -> pa.Table:
    """Rows of :func:`_schema` for chunks and their token vectors."""
    schema = _schema(meta)
    assert encoded.spans is not None
    offsets = encoded.offsets.astype(np.int32)
    columns: dict[str, Any] = {
        "id": pa.array([row["id"] for row in chunks]),
        "content_hash": pa.array([row["content_hash"] for row in chunks]),
        "spans": pa.ListArray.from_arrays(2 * offsets, encoded.spans.astype(np.int32).reshape(-1)),
        "encoding": fixed_size_lists(encoder.encode_documents(encoded).astype(np.float16)),
    }
    vectors = encoded.vectors.astype(np.float16)
    if meta["precision"] == "int8":
        scales = (np.maximum(np.abs(encoded.vectors).max(1, initial=0), 1e-12) / 127).astype(np.float32)
        vectors = np.rint(encoded.vectors / scales[:, None]).astype(np.int8)
        columns["scales"] = pa.ListArray.from_arrays(offsets, scales)
    columns["vectors"] = pa.ListArray.from_arrays(offsets, fixed_size_lists(vectors))
    return pa.table([columns[name].cast(schema.field(name).type) for name in schema.names], schema=schema)
