"""From documents and their vectors to the rows of the tables, and what rows say about documents already there."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from polyhead.errors import PolyheadError
from polyhead.search.filters import is_one_of
from polyhead.search.heads import head_statistics, prepare_heads
from polyhead.search.ingest import Document, FileStamp
from polyhead.search.schema import IndexMeta, chunk_schema, files_schema, fixed_size_lists

if TYPE_CHECKING:
    from polyhead.embed import ChunkEmbeddings
    from polyhead.search.store import Store

__all__ = [
    "Existing",
    "FileInHand",
    "Piece",
    "amended",
    "centred_again",
    "chunk_rows",
    "document_hash",
    "existing_rows",
    "file_rows",
    "pieces_of",
    "with_statistics",
]

PIECE_CHARACTERS = 200_000
LEAST_TO_CENTRE = 16


@dataclass
class Existing:
    """The rows of one document that are in the index already."""

    ids: list[str] = field(default_factory=list)
    hashes: set[str] = field(default_factory=set)
    last_start: int = -1

    def is_complete(self, digest: str, last_start: int) -> bool:
        """Whether all rows are of the content ``digest``, and they go on to the piece at ``last_start``.

        A document's rows are committed in order, so a gap means that another version's rows stood there.
        """
        numbers = {int(one.rpartition("#")[2]) for one in self.ids}
        return self.hashes == {digest} and numbers == set(range(len(self.ids))) and self.last_start >= last_start


@dataclass
class FileInHand:
    """A file being read. ``live``: ids of its rows that stay, noted only where it has rows already."""

    stamp: FileStamp
    digest: str | None
    is_new: bool
    existing: dict[str, Existing]
    documents: int = 0
    chunks: int = 0
    error: str | None = None
    live: set[str] = field(default_factory=set)

    def keep(self, rows: Existing) -> None:
        """Count rows that are there already as the file's own."""
        self.live.update(rows.ids)
        self.chunks += len(rows.ids)

    def stale(self) -> Iterator[str]:
        """Ids of rows that the file no longer has."""
        return (one for rows in self.existing.values() for one in rows.ids if one not in self.live)


@dataclass(frozen=True)
class Piece:
    """What goes to the encoder as one text: a document, or a stretch of a very long one.

    ``start`` is where the stretch begins in the document's text, ``lead`` how many characters of ``text`` stand before
    it (the title), ``numbers`` counts the chunks of the document.
    """

    file: FileInHand
    document: Document
    digest: str
    start: int
    lead: int
    text: str
    numbers: Iterator[int]


def document_hash(document: Document) -> str:
    """Digest of all that a document's rows are made from."""
    content = [document.title, document.kind, document.attributes, document.headings, document.text]
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def pieces_of(document: Document, digest: str, file: FileInHand) -> list[Piece]:
    """A document as one piece, or as several where its text is very long; none where it is blank.

    The title goes before the text it belongs to, where the text does not begin with it: a page on one subject
    often names it only there.
    """
    text, numbers = document.text, itertools.count()
    if not text.strip():
        return []
    title = (document.title or "").strip()
    opening = text.lstrip()[: len(title)]
    lead = f"{title}\n" if title and opening.casefold() != title.casefold() else ""
    pieces, start = [], 0
    while start < len(text):
        end = _cut(text, start)
        part = lead + text[start:end] if start == 0 else text[start:end]
        if part.strip():
            pieces.append(Piece(file, document, digest, start, len(lead) if start == 0 else 0, part, numbers))
        start = end
    return pieces


def _cut(text: str, start: int) -> int:
    """Where the piece that begins at ``start`` ends: at a line's or a word's end, where there is one."""
    end = start + PIECE_CHARACTERS
    if end >= len(text):
        return len(text)
    for mark in ("\n", " "):
        found = text.rfind(mark, start + PIECE_CHARACTERS // 2, end)
        if found >= 0:
            return found + 1
    return end


def chunk_rows(pieces: Sequence[Piece], encoded: ChunkEmbeddings, meta: IndexMeta) -> pa.Table:
    """One row a chunk, in the order of ``encoded``.

    Raises:
        PolyheadError: the encoder gave a vector that is not finite, or no head vectors for an index that has them.
    """
    finite = np.isfinite(encoded.dense).all(1)
    if encoded.heads is not None:
        finite &= np.isfinite(encoded.heads).all((1, 2, 3))
    if not finite.all():
        bad = pieces[int(encoded.owner[int(np.argmin(finite))])].document
        raise PolyheadError(
            f"The encoder gave a vector with infinite or undefined numbers for {bad.id}. Try --backend torch, and "
            "please report the model and this document."
        )
    rows = [
        _row(pieces[owner], start, end)
        for owner, start, end in zip(encoded.owner.tolist(), encoded.start.tolist(), encoded.end.tolist(), strict=True)
    ]
    schema = chunk_schema(meta)
    columns = {
        name: pa.array([row[name] for row in rows], schema.field(name).type) for name in (rows[0] if rows else ())
    }
    columns["dense"] = fixed_size_lists(np.ascontiguousarray(encoded.dense, dtype=np.float32))
    if meta.head_mean is not None:
        if encoded.heads is None:
            raise PolyheadError(
                "The encoder gave no head vectors, and this index has them. Make it anew with --rebuild."
            )
        columns |= _head_columns(encoded.heads, meta.head_mean)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _row(piece: Piece, start: int, end: int) -> dict[str, Any]:
    document, stamp = piece.document, piece.file.stamp
    begin = piece.start + max(0, start - piece.lead)
    stop = piece.start + max(0, end - piece.lead)
    return {
        "id": f"{document.id}#{next(piece.numbers)}",
        "doc_id": document.id,
        "path": stamp.path,
        "title": document.title,
        "heading": document.heading_at(begin),
        "kind": document.kind,
        "size": stamp.size,
        "modified": stamp.mtime_ns // 1000,
        "start": begin,
        "end": stop,
        "text": document.text[begin:stop],
        "content_hash": piece.digest,
        # Without blanks and sorted: filters on attributes look for patterns in it.
        "attributes": json.dumps(document.attributes, sort_keys=True, separators=(",", ":"), ensure_ascii=False),
    }


def _head_columns(raw: np.ndarray, mean: np.ndarray) -> dict[str, pa.Array]:
    norms = np.linalg.norm(raw.astype(np.float32) - mean, axis=-1).reshape(len(raw), -1)
    return {
        "heads": fixed_size_lists(prepare_heads(raw, mean).astype(np.float16)),
        "head_norms": fixed_size_lists(norms.astype(np.float32)),
    }


def with_statistics(meta: IndexMeta, raw: np.ndarray) -> IndexMeta:
    """``meta`` with mean and importance of the head vectors ``raw [n, layers, heads, head_dim]``.

    Below 16 texts there is no middle worth taking off (of one text nothing would be left): the mean is zero.
    """
    mean, importance = head_statistics(raw)
    if len(raw) < LEAST_TO_CENTRE:
        mean = np.zeros_like(mean)
    return replace(meta, head_mean=mean, head_importance=importance, sample_rows=len(raw))


def centred_again(rows: pa.Table, meta: IndexMeta) -> tuple[IndexMeta, pa.Table]:
    """All ``rows`` with head statistics taken from them and not from the few rows the index began with.

    The encoder's own vectors come back from the stored ones (to the precision of float16): nothing is encoded again.
    """
    assert meta.head_mean is not None
    n, (layers, heads, head_dim) = rows.num_rows, meta.head_shape
    unit = rows["heads"].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    norms = rows["head_norms"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    raw = unit.reshape(n, layers, heads, head_dim) * norms.reshape(n, layers, heads, 1) + meta.head_mean
    meta = with_statistics(meta, raw)
    assert meta.head_mean is not None
    for name, column in _head_columns(raw, meta.head_mean).items():
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), column)
    return meta, rows


def amended(kept: Sequence[tuple[str, FileStamp]]) -> pa.Table:
    """The new size and time of rows that stay although their file changed."""
    schema = pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("size", pa.int64(), nullable=False),
            pa.field("modified", pa.timestamp("us", "UTC"), nullable=False),
        ]
    )
    columns = [
        [one for one, _ in kept],
        [stamp.size for _, stamp in kept],
        pa.array([stamp.mtime_ns // 1000 for _, stamp in kept], schema.field("modified").type),
    ]
    return pa.table(columns, schema=schema)


def file_rows(records: Sequence[dict[str, Any]]) -> pa.Table:
    """Records of files as :func:`polyhead.search.schema.files_schema` has them."""
    return pa.Table.from_pylist(list(records), schema=files_schema())


def existing_rows(store: Store, paths: Iterable[str]) -> dict[str, dict[str, Existing]]:
    """Path -> document -> its rows, for files that may have some already."""
    table = store.rows(["id", "doc_id", "path", "content_hash", "start"], is_one_of("path", paths))
    found: dict[str, dict[str, Existing]] = {}
    for one, doc_id, path, digest, start in zip(*(column.to_pylist() for column in table.columns[:5]), strict=True):
        rows = found.setdefault(path, {}).setdefault(doc_id, Existing())
        rows.ids.append(one)
        rows.hashes.add(digest)
        rows.last_start = max(rows.last_start, start)
    return found
