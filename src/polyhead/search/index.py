"""An index of documents on disk: made once, then kept up to date by encoding only what changed."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead.errors import IndexBusyError, IndexMismatchError, InputError, PolyheadError
from polyhead.paths import home
from polyhead.search.heads import head_statistics, prepare_heads
from polyhead.search.ingest import Document, FileStamp, ReadProblem, ScanResult, read_documents, scan
from polyhead.search.store import IndexMeta, Store

if TYPE_CHECKING:
    from polyhead.embed import Encoder
    from polyhead.search.view import View

__all__ = ["Index", "UpdateReport", "default_index_uri"]

Progress = Callable[[int, "int | None"], None]

BATCH_DOCUMENTS = 512
"""Documents encoded and written together: what a kill can cost, and what is held in memory."""

HEAD_SAMPLE = 10_000


def default_index_uri(path: str | Path) -> str:
    """Where the index of a folder or file lives unless told otherwise: below :func:`polyhead.paths.home`."""
    absolute = os.path.abspath(path)
    digest = hashlib.sha256(absolute.encode(errors="surrogateescape")).hexdigest()[:12]
    name = "".join(c if c.isalnum() else "-" for c in os.path.basename(absolute)) or "root"
    return str(home() / "indexes" / f"{name}-{digest}")


@dataclass
class UpdateReport:
    """What one update did. Files are counted; ``problems`` names what could not be read, with the reason.

    Attributes:
        added, changed, removed, unchanged: files.
        failed: files of which nothing could be read; they are tried again when they change.
        chunks: rows written by this update.
        total_chunks: rows the index now holds.
        empty: files read without finding any text.
        skipped: files of kinds that are not read, counted by suffix.
        seconds: wall time.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    failed: int = 0
    empty: int = 0
    chunks: int = 0
    total_chunks: int = 0
    problems: list[ReadProblem] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        plain = {name: value for name, value in vars(self).items() if name != "problems"}
        return {**plain, "problems": [str(problem) for problem in self.problems]}


@dataclass
class _Pending:
    """A file whose documents are being encoded."""

    stamp: FileStamp
    file_hash: str
    is_new: bool
    documents: int = 0
    chunks: int = 0
    error: str | None = None

    def row(self) -> dict[str, Any]:
        return {
            "path": self.stamp.path,
            "size": self.stamp.size,
            "mtime_ns": self.stamp.mtime_ns,
            "file_hash": self.file_hash,
            "documents": self.documents,
            "chunks": self.chunks,
            "error": self.error,
        }


class Index:
    """An index at ``uri``: a local folder, or an object store that LanceDB understands.

    Args:
        uri: where; :func:`default_index_uri` gives the default for a path.
        storage_options: credentials of an object store.

    Example:
        >>> index = Index(default_index_uri("docs"))                        # doctest: +SKIP
        >>> report = index.update("docs", lambda: Encoder())                # doctest: +SKIP
        >>> report.added, report.total_chunks                               # doctest: +SKIP
        (12, 80)
    """

    def __init__(self, uri: str, *, storage_options: dict[str, str] | None = None) -> None:
        self.uri = str(uri)
        self._local = "://" not in self.uri
        if self._local and os.path.isfile(self.uri):
            raise InputError(f"'{self.uri}' is a file; an index is a folder. Give another --index.")
        self.store = Store(self.uri, storage_options=storage_options)

    def exists(self) -> bool:
        """Whether there is a complete index here."""
        return self.store.exists()

    @property
    def meta(self) -> IndexMeta:
        """What the index was made with."""
        return self.store.meta

    def view(self, where: str | None = None) -> View:
        """The rows that pass a filter, ready to search."""
        return self.store.view(where)

    def check(self, encoder: Encoder) -> None:
        """Refuse an encoder that did not make this index.

        Raises:
            IndexMismatchError: other model files, pooling or layers.
        """
        meta = self.meta
        if encoder.fingerprint != meta.fingerprint:
            raise IndexMismatchError(
                f"The index at '{self.uri}' was made with '{meta.model}' (fingerprint {meta.fingerprint[:12]}), "
                f"this is '{encoder.name}' (fingerprint {encoder.fingerprint[:12]}): their vectors cannot be compared. "
                f"Search it with --model {meta.model}, or make it again with: polyhead index PATH --rebuild"
            )

    def update(
        self,
        path: str | Path,
        encoder_factory: Callable[[], Encoder],
        *,
        model: str | None = None,
        text_field: str = "text",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rebuild: bool = False,
        progress: Progress | None = None,
    ) -> UpdateReport:
        """Bring the index up to date with the files at ``path``; only new and changed files are read and encoded.

        Written in batches, each committed: interrupted or killed, the next run goes on where this one stopped.

        Args:
            path: a folder, or one file.
            encoder_factory: called only if there is something to encode.
            model: the model's name, compared with the index's without loading anything.
            text_field: the field that holds the text in .json, .jsonl and .csv files.
            include, exclude: globs over relative paths and names.
            rebuild: drop the index and make it again.
            progress: called with files done and files to do.

        Raises:
            InputError: no such path, or nothing there that can be read.
            IndexMismatchError: the index was made with another model or other settings.
            IndexBusyError: another process is writing it.
        """
        started = time.perf_counter()
        found = scan(path, include=include, exclude=exclude)
        settings = {"text_field": text_field, "include": list(include or ()), "exclude": list(exclude or ())}
        with self._lock():
            if rebuild:
                self.store.drop()
            exists = self.exists()
            if exists:
                self._check_settings(model, settings)
            elif not found.files:
                raise InputError(_nothing_readable(path, found))
            report = _Update(self, found, settings, progress).run(encoder_factory, exists)
        report.seconds = time.perf_counter() - started
        return report

    def _check_settings(self, model: str | None, settings: dict[str, Any]) -> None:
        meta = self.meta
        if model is not None and model != meta.model:
            raise IndexMismatchError(
                f"The index at '{self.uri}' was made with the model '{meta.model}', and '{model}' was asked for. "
                f"Use --model {meta.model}, or make the index again with: polyhead index PATH --model {model} --rebuild"
            )
        if settings != meta.settings:
            changed = ", ".join(
                f"{k}={meta.settings.get(k)!r}" for k in settings if settings[k] != meta.settings.get(k)
            )
            raise IndexMismatchError(
                f"The index at '{self.uri}' was made with other settings ({changed}). Use the same, or make it again "
                "with: polyhead index PATH --rebuild"
            )

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """One writer at a time on a local disk; on an object store the primary key keeps two writers apart."""
        if not self._local:
            yield
            return
        from filelock import FileLock, Timeout

        os.makedirs(self.uri, exist_ok=True)
        owner = Path(self.uri) / ".writer"
        lock = FileLock(str(Path(self.uri) / ".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            who = owner.read_text(encoding="utf-8") if owner.exists() else "unknown"
            raise IndexBusyError(
                f"Another process (pid {who}) is writing the index at '{self.uri}'. Wait for it to end; searching the "
                "last committed state is possible meanwhile."
            ) from error
        except OSError as error:
            raise InputError(f"The index at '{self.uri}' cannot be written: {error}. Give another --index.") from error
        try:
            owner.write_text(str(os.getpid()), encoding="utf-8")
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()


class _Update:
    """One run of :meth:`Index.update`."""

    def __init__(self, index: Index, found: ScanResult, settings: dict[str, Any], progress: Progress | None) -> None:
        self.store = index.store
        self.index = index
        self.found = found
        self.settings = settings
        self.progress = progress or (lambda done, total: None)
        self.report = UpdateReport(skipped=dict(found.skipped), problems=list(found.unreadable))
        self.meta: IndexMeta | None = None
        self.encoder: Encoder | None = None
        self.finished: list[_Pending] = []
        self.written: dict[tuple[str, str], set[str]] = {}
        self.files_done = 0
        self.files_to_do = 0

    def run(self, encoder_factory: Callable[[], Encoder], exists: bool) -> UpdateReport:
        known = self.store.files() if exists else {}
        stamps = {stamp.path: stamp for stamp in self.found.files}
        # A folder that could not be listed says nothing about its files: what is known of them stays.
        lost = tuple(f"{problem.path}/" for problem in self.found.unreadable)
        gone = [path for path in known if path not in stamps and not path.startswith(lost)]
        if gone:
            self.store.delete_stale_chunks(gone, [])
            self.store.delete_files(gone)
        self.report.removed = len(gone)
        changed = [stamp for stamp in self.found.files if not _same_stamp(stamp, known.get(stamp.path))]
        self._keep_unchanged(known, stamps, {stamp.path for stamp in changed})
        self.files_to_do = len(changed)
        if changed:
            self._encode(changed, known, encoder_factory, exists)
        if changed or gone:
            self.store.optimize()
        self.report.total_chunks = self.store.count() if self.index.exists() else 0
        return self.report

    def _keep_unchanged(self, known: dict[str, Any], stamps: dict[str, FileStamp], changed: set[str]) -> None:
        for path, row in known.items():
            if path in stamps and path not in changed:
                self._count_unchanged(row)

    def _count_unchanged(self, row: dict[str, Any]) -> None:
        if row["error"]:
            self.report.failed += 1
            self.report.problems.append(ReadProblem(row["path"], row["error"]))
        else:
            self.report.unchanged += 1

    def _encode(
        self, changed: list[FileStamp], known: dict[str, Any], encoder_factory: Callable[[], Encoder], exists: bool
    ) -> None:
        if exists:
            self.meta = self.store.meta
        self.written = self.store.written_documents() if exists else {}
        batch: list[tuple[Document, _Pending]] = []
        finished: list[_Pending] = []
        touched: list[dict[str, Any]] = []
        for stamp in changed:
            pending = self._open(stamp, known.get(stamp.path), touched)
            if pending is None:
                continue
            for document in self._documents(pending):
                batch.append((document, pending))
                if len(batch) >= BATCH_DOCUMENTS:
                    self._write(batch, finished, encoder_factory)
                    batch, finished = [], []
            finished.append(pending)
        self._write(batch, finished, encoder_factory)
        if self.meta is None:
            reasons = "; ".join(str(problem) for problem in self.report.problems[:5]) or "they hold no text"
            raise InputError(f"Nothing to index: {len(changed)} files were read and gave no document ({reasons}).")
        self.store.upsert_files(touched)

    def _open(self, stamp: FileStamp, row: dict[str, Any] | None, touched: list[dict[str, Any]]) -> _Pending | None:
        """Hash a file; None where it only looked changed."""
        try:
            file_hash = _hash_file(stamp.absolute)
        except OSError as error:
            self.report.problems.append(ReadProblem(stamp.path, f"{error.strerror or error}".lower()))
            self.report.failed += 1
            self._step()
            return None
        if row is not None and row["file_hash"] == file_hash:
            touched.append({**row, "size": stamp.size, "mtime_ns": stamp.mtime_ns})
            self._count_unchanged(row)
            self._step()
            return None
        return _Pending(stamp, file_hash, is_new=row is None)

    def _documents(self, pending: _Pending) -> Iterable[Document]:
        """The documents of a file; whatever goes wrong is counted and named, and never stops the rest."""
        problems: list[ReadProblem] = []
        try:
            for document in read_documents(pending.stamp, text_field=self.settings["text_field"], problems=problems):
                pending.documents += 1
                yield document
        except PolyheadError as error:
            pending.error = getattr(error, "reason", None) or str(error)
            self.report.problems.append(ReadProblem(pending.stamp.path, pending.error))
        self.report.problems.extend(problems)

    def _write(
        self,
        batch: list[tuple[Document, _Pending]],
        finished: list[_Pending],
        encoder_factory: Callable[[], Encoder],
    ) -> None:
        """Encode and commit a batch: chunks first, then what they replace goes, then the files count as done."""
        fresh = [
            (document, pending)
            for document, pending in batch
            if document.id not in self.written.get((pending.stamp.path, pending.file_hash), ())
        ]
        if fresh:
            self._write_chunks(fresh, encoder_factory)
        self.finished += finished
        if self.meta is None:  # no document yet, so there are no tables either
            return
        if self.finished:
            done = self.finished
            self.store.delete_stale_chunks([p.stamp.path for p in done], [p.file_hash for p in done])
            self.store.upsert_files([pending.row() for pending in done])
        for pending in self.finished:
            self._count_finished(pending)
        self.finished = []

    def _count_finished(self, pending: _Pending) -> None:
        if pending.error is not None and not pending.documents:
            self.report.failed += 1
        elif pending.is_new:
            self.report.added += 1
        else:
            self.report.changed += 1
        if pending.error is None and not pending.documents:
            self.report.empty += 1
        self._step()

    def _step(self) -> None:
        self.files_done += 1
        self.progress(self.files_done, self.files_to_do)

    def _write_chunks(self, fresh: list[tuple[Document, _Pending]], encoder_factory: Callable[[], Encoder]) -> None:
        if self.encoder is None:
            self.encoder = encoder_factory()
            if self.meta is not None:
                self.index.check(self.encoder)
        texts = [_chunk_text(document) for document, _ in fresh]
        encoded = self.encoder.encode_chunks(texts, heads=True)
        if encoded.heads is None:
            raise PolyheadError(f"The encoder '{self.encoder.name}' gave no head vectors although they were asked for.")
        if self.meta is None:
            mean, importance = head_statistics(encoded.heads[:HEAD_SAMPLE])
            shape = self.encoder.head_shape
            self.meta = IndexMeta(
                self.encoder.name, self.encoder.fingerprint, self.encoder.dim, shape, mean, importance, self.settings
            )
            self.store.create(self.meta)
        columns = _columns(fresh, texts, encoded)
        self.store.upsert_chunks(columns, encoded.dense, prepare_heads(encoded.heads, self.meta.head_mean))
        for owner in encoded.owner:
            fresh[int(owner)][1].chunks += 1
        self.report.chunks += len(encoded.owner)


def _chunk_text(document: Document) -> str:
    """What is encoded: the text, under its title where it does not begin with it."""
    title = (document.title or "").strip()
    if not title or document.text.lstrip()[: len(title)].casefold() == title.casefold():
        return document.text
    return f"{title}\n{document.text}"


def _columns(fresh: list[tuple[Document, _Pending]], texts: list[str], encoded: Any) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    numbers: dict[int, int] = {}
    for owner, start, end in zip(encoded.owner.tolist(), encoded.start.tolist(), encoded.end.tolist(), strict=True):
        document, pending = fresh[owner]
        number = numbers.get(owner, 0)
        numbers[owner] = number + 1
        added = len(texts[owner]) - len(document.text)  # the title's line, which is not in the document's text
        begin = max(0, start - added)
        row = {
            "id": f"{document.id}#{number}" if number else document.id,
            "doc_id": document.id,
            "path": pending.stamp.path,
            "title": document.title,
            "heading": document.heading_at(begin),
            "kind": document.kind,
            "size": pending.stamp.size,
            "modified": datetime.fromtimestamp(pending.stamp.mtime_ns / 1e9, tz=timezone.utc),
            "start": begin,
            "end": max(0, end - added),
            "text": document.text[begin : max(0, end - added)],
            "attributes": json.dumps(document.attributes, ensure_ascii=False) if document.attributes else None,
            "file_hash": pending.file_hash,
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def _same_stamp(stamp: FileStamp, row: dict[str, Any] | None) -> bool:
    return row is not None and row["size"] == stamp.size and row["mtime_ns"] == stamp.mtime_ns


def _hash_file(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _nothing_readable(path: str | Path, found: ScanResult) -> str:
    from polyhead.search.ingest import SUPPORTED

    skipped = ", ".join(f"{count} {suffix}" for suffix, count in found.skipped.most_common(5)) or "no files at all"
    return (
        f"Nothing to index at '{path}': found {skipped}. Expected files of {' '.join(sorted(SUPPORTED))}; "
        "check the path and the --include and --exclude globs."
    )
