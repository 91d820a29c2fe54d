"""How an index looks on disk: the columns of its tables, and what it remembers about how it was made."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from polyhead.errors import IndexMismatchError, IndexStorageError

__all__ = ["CHUNKS", "FILES", "FORMAT_VERSION", "IndexMeta", "chunk_schema", "files_schema", "fixed_size_lists"]

FORMAT_VERSION = 1
CHUNKS, FILES = "chunks", "files"
META_KEY = b"polyhead"
# Without a primary key, two writers that upsert the same new ids leave duplicates (lancedb issue 3377).
_PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}


@dataclass(frozen=True)
class IndexMeta:
    """What the vectors of an index depend on; written once, with the table.

    Attributes:
        model: name the encoder was asked for by.
        fingerprint: of the encoder; vectors of two encoders with one fingerprint may be compared.
        dim: of the dense vectors.
        head_shape: ``(layers, heads, head_dim)``.
        head_mean: ``[layers, heads, head_dim]`` float32, taken off every head vector, rows and queries alike. Fixed by
            the first rows, so that rows added later stay comparable; None where the index has no head vectors.
        head_importance: ``[layers, heads]`` float32 (:func:`polyhead.search.heads.head_statistics`), or None.
        sample_rows: how many rows the two statistics come from.
        settings: how documents are read (root, text_field, include, exclude); kept apart, as they may change.
    """

    model: str
    fingerprint: str
    dim: int
    head_shape: tuple[int, int, int]
    head_mean: np.ndarray | None = field(default=None, compare=False)
    head_importance: np.ndarray | None = field(default=None, compare=False)
    sample_rows: int = 0
    settings: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def head_width(self) -> int:
        """Numbers in one row's head vectors; 0 without them."""
        layers, heads, head_dim = self.head_shape
        return layers * heads * head_dim if self.head_mean is not None else 0

    def to_metadata(self) -> dict[bytes, bytes]:
        """As Arrow schema metadata."""
        plain: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "dim": self.dim,
            "head_shape": list(self.head_shape),
            "head_mean": _pack(self.head_mean),
            "head_importance": _pack(self.head_importance),
            "sample_rows": self.sample_rows,
        }
        return {META_KEY: json.dumps(plain).encode()}

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None, uri: str) -> IndexMeta:
        """Read back what :meth:`to_metadata` wrote.

        Raises:
            IndexStorageError: the table at ``uri`` was not made by Polyhead.
            IndexMismatchError: it has another format version.
        """
        raw = (metadata or {}).get(META_KEY)
        if raw is None:
            raise IndexStorageError(
                f"{uri} holds a table named '{CHUNKS}' that Polyhead did not make. Expected a Polyhead index; "
                "name another folder with --index."
            )
        plain = json.loads(raw)
        found = plain.get("format_version")
        if found != FORMAT_VERSION:
            raise IndexMismatchError(
                f"The index {uri} has format version {found}; this Polyhead reads version {FORMAT_VERSION}. "
                "Make it anew with: polyhead index PATH --rebuild"
            )
        layers, heads, head_dim = plain["head_shape"]
        return cls(
            plain["model"],
            plain["fingerprint"],
            plain["dim"],
            (layers, heads, head_dim),
            _unpack(plain["head_mean"], (layers, heads, head_dim)),
            _unpack(plain["head_importance"], (layers, heads)),
            plain["sample_rows"],
        )


def _pack(array: np.ndarray | None) -> str | None:
    return None if array is None else base64.b64encode(np.ascontiguousarray(array, "<f4").tobytes()).decode()


def _unpack(packed: str | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if packed is None:
        return None
    return np.frombuffer(base64.b64decode(packed), "<f4").reshape(shape).astype(np.float32)


def chunk_schema(meta: IndexMeta) -> pa.Schema:
    """Columns of the table of chunks.

    ``heads`` are centred by ``meta.head_mean``, each head of unit length, end to end; ``head_norms`` are the lengths
    before that, so that ``heads * head_norms + head_mean`` gives back what the encoder made.
    """
    fields = [
        pa.field("id", pa.string(), nullable=False, metadata=_PRIMARY_KEY),
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        pa.field("heading", pa.string()),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("modified", pa.timestamp("us", "UTC"), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("end", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("content_hash", pa.string(), nullable=False),
        pa.field("attributes", pa.string(), nullable=False),
        pa.field("dense", pa.list_(pa.float32(), meta.dim)),
    ]
    if meta.head_mean is not None:
        layers, heads, _ = meta.head_shape
        fields.append(pa.field("heads", pa.list_(pa.float16(), meta.head_width)))
        fields.append(pa.field("head_norms", pa.list_(pa.float32(), layers * heads)))
    return pa.schema(fields, metadata=meta.to_metadata())


def files_schema() -> pa.Schema:
    """Columns of the table of files: what each looked like when it was read, and what came of it."""
    return pa.schema(
        [
            pa.field("path", pa.string(), nullable=False, metadata=_PRIMARY_KEY),
            pa.field("size", pa.int64(), nullable=False),
            pa.field("mtime_ns", pa.int64(), nullable=False),
            pa.field("content_hash", pa.string()),
            pa.field("chunks", pa.int64(), nullable=False),
            pa.field("error", pa.string()),
        ]
    )


def fixed_size_lists(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """``[n, width]`` as an Arrow column of lists, without copying."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
