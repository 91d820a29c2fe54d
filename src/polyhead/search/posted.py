"""Documents that a program puts into an index itself, beside those that are read from files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from polyhead.errors import InputError
from polyhead.search.ingest import Document, FileStamp, ScanResult
from polyhead.search.ingest.document import Scalar, clean
from polyhead.search.update import POSTED, Update

if TYPE_CHECKING:
    from polyhead.embed import Encoder
    from polyhead.search.index import Index, UpdateReport

__all__ = ["POSTED", "Posted"]


@dataclass(frozen=True)
class Posted:
    """A document from no file.

    Attributes:
        id: the caller's own, unique among the documents put.
        text: what is searched.
        title: goes before the text it belongs to.
        kind: for filters, such as ``kind = 'ticket'``.
        attributes: for filters, such as ``attributes.year > 2020``.
    """

    id: str
    text: str
    title: str | None = None
    kind: str = "text"
    attributes: dict[str, Scalar] = field(default_factory=dict)


def put(index: Index, documents: Sequence[Posted], encoder_factory: Callable[[], Encoder]) -> UpdateReport:
    """See :meth:`polyhead.search.Index.put`, which holds the lock."""
    if not documents:
        raise InputError("No documents were given; give at least one.")
    started, now = time.perf_counter(), time.time_ns()
    last = {document.id: document for document in documents}
    exists = index.exists()
    settings = dict(index.meta.settings) if exists else {"text_field": "text", "include": [], "exclude": []}
    update = Update(index, ScanResult(""), settings, encoder_factory, None)
    report = update.put([_filed(document, now) for document in last.values()], exists)
    report.seconds = time.perf_counter() - started
    return report


def remove(index: Index, ids: Sequence[str]) -> int:
    """See :meth:`polyhead.search.Index.remove`, which holds the lock."""
    if not index.exists():
        return 0
    known = index.store.files(list({POSTED + clean(one) for one in ids}))["path"].to_pylist()
    index.store.delete_paths(known)
    index.store.delete_files(known)
    return len(known)


def _filed(document: Posted, now: int) -> tuple[FileStamp, Document]:
    path, text = POSTED + clean(document.id), clean(document.text)
    title = None if document.title is None else clean(document.title)
    attributes = {clean(k): clean(v) if isinstance(v, str) else v for k, v in document.attributes.items()}
    stamp = FileStamp(path, "", document.kind, len(text.encode()), now)
    return stamp, Document(path, text, path, title, clean(document.kind), attributes)
