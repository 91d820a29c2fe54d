"""One run of bringing an index up to date: what changed is read, encoded and committed, batch by batch."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from polyhead.errors import InputError, ReadError
from polyhead.search.index import UpdateReport
from polyhead.search.ingest import Document, FileStamp, ReadProblem, ScanResult, read_documents
from polyhead.search.planner import SearchLimits
from polyhead.search.rows import (
    Existing,
    FileInHand,
    Piece,
    amended,
    centred_again,
    chunk_rows,
    document_hash,
    existing_rows,
    file_rows,
    pieces_of,
    with_statistics,
)
from polyhead.search.schema import IndexMeta
from polyhead.search.store import Store, is_local

if TYPE_CHECKING:
    from polyhead.embed import ChunkEmbeddings, Encoder
    from polyhead.search.index import Index

__all__ = ["POSTED", "Update"]

POSTED = "posted:"
"""Begins the path of a document that was put into the index and comes from no file (a file's path is relative)."""

BATCH_PIECES = 1_024
BATCH_CHARACTERS = 1_000_000
"""A batch is what a kill can cost and what is held in memory: about ten seconds of encoding on two cores."""

FILES_AT_ONCE = 200
SAMPLE_ENOUGH = 256
CANNOT_OPEN = "cannot be opened: "
UNCERTAIN_NS = 100_000_000  # clocks of file systems tick; a file this young may change again within one tick


class Update:
    """See :meth:`polyhead.search.index.Index.update`, whose parts these are; made for one :meth:`run`."""

    def __init__(
        self,
        index: Index,
        found: ScanResult,
        settings: dict[str, Any],
        encoder_factory: Callable[[], Encoder],
        progress: Callable[[int, int | None], None] | None,
    ) -> None:
        self._index = index
        self._found = found
        self._settings = settings
        self._encoder_factory = encoder_factory
        self._progress = progress or (lambda done, total: None)
        self._report = UpdateReport(skipped=dict(found.skipped), problems=list(found.unreadable))
        self._store: Store | None = None
        self._encoder: Encoder | None = None
        self._started_ns = time.time_ns()
        self._pieces: list[Piece] = []
        self._characters = 0
        self._finished: list[FileInHand] = []
        self._records: list[dict[str, Any]] = []
        self._kept: list[tuple[str, FileStamp]] = []
        self._done = 0
        self._to_do = 0

    def run(self, exists: bool) -> UpdateReport:
        """Do it. ``exists``: whether the index is there and may be added to."""
        known = self._open() if exists else {}
        stamps = {stamp.path: stamp for stamp in self._found.files}
        if exists:
            self._refuse_another_folder(known, stamps)
            self._remove(known, stamps)
        to_do = [stamp for stamp in self._found.files if not _is_unchanged(stamp, known.get(stamp.path))]
        doing = {stamp.path for stamp in to_do}
        for path, row in known.items():
            if path in stamps and path not in doing:
                self._count_unchanged(row)
        self._to_do = len(to_do)
        if not exists:
            # The first batch fixes the mean of the head vectors: it must not be one subfolder's.
            random.Random(0).shuffle(to_do)
        self._read(to_do, known)
        if self._store is None:
            raise InputError(self._no_text(to_do))
        if self._store.meta.settings != self._settings:
            self._store.put_settings(self._settings)
        if to_do or self._report.removed:
            self._report.upkeep = self._store.tidy(exact_rows=SearchLimits().exact_rows)
        self._report.total_chunks = self._store.count()
        return self._report

    def put(self, documents: Sequence[tuple[FileStamp, Document]], exists: bool) -> UpdateReport:
        """Instead of :meth:`run`: documents from no file, each in the place of an earlier one of its path."""
        known: set[str] = set()
        existing: dict[str, dict[str, Existing]] = {}
        if exists:
            self._store = self._index.store
            paths = [stamp.path for stamp, _ in documents]
            existing = existing_rows(self._store, paths)
            known = set(self._store.files(paths)["path"].to_pylist())
        self._to_do = len(documents)
        for stamp, document in documents:
            digest = document_hash(document)
            file = FileInHand(stamp, digest, stamp.path not in known, existing.get(stamp.path, {}), documents=1)
            self._add(document, file)
            self._finish(file)
        self._flush()
        if self._store is None:
            raise InputError("The documents hold no text; give at least one with some.")
        self._report.upkeep = self._store.tidy(exact_rows=SearchLimits().exact_rows)
        self._report.total_chunks = self._store.count()
        return self._report

    # What there is ------------------------------------------------------------------------------------------------

    def _open(self) -> dict[str, dict[str, Any]]:
        """The files that the index knows, by path; documents that come from no file are not among them."""
        self._store = self._index.store
        return {row["path"]: row for row in self._store.files().to_pylist() if not row["path"].startswith(POSTED)}

    def _refuse_another_folder(self, known: dict[str, Any], stamps: dict[str, FileStamp]) -> None:
        """A wrong --index must not empty an index of other files; a folder that moved is welcome."""
        root = self._index.meta.settings.get("root")
        if root in (None, self._found.root) or not known:
            return
        if 2 * len(known.keys() & stamps.keys()) < len(known):
            raise InputError(
                f"The index {self._index.uri} holds the files of {root}, most of them are not in {self._found.root}. "
                "Name another --index for this folder, or make this one anew with --rebuild."
            )

    def _remove(self, known: dict[str, Any], stamps: dict[str, FileStamp]) -> None:
        assert self._store is not None
        # A folder that could not be listed says nothing about its files: what is known of them stays.
        unlisted = tuple("" if p.path == "." else f"{p.path}/" for p in self._found.unreadable)
        gone = [path for path in known if path not in stamps and not path.startswith(unlisted)]
        if gone:
            self._store.delete_paths(gone)
            self._store.delete_files(gone)
        self._report.removed = len(gone)

    def _count_unchanged(self, row: dict[str, Any]) -> None:
        if row["error"]:
            self._report.problems.append(ReadProblem(row["path"], row["error"]))
        if row["error"] and not row["chunks"]:
            self._report.failed += 1
        else:
            self._report.unchanged += 1

    # Reading ------------------------------------------------------------------------------------------------------

    def _read(self, to_do: Sequence[FileStamp], known: dict[str, dict[str, Any]]) -> None:
        with_rows = self._store.paths() if self._store is not None and to_do else set()
        for start in range(0, len(to_do), FILES_AT_ONCE):
            some = to_do[start : start + FILES_AT_ONCE]
            paths = [stamp.path for stamp in some if stamp.path in with_rows]
            existing = existing_rows(self._store, paths) if self._store is not None and paths else {}
            for stamp in some:
                self._read_file(stamp, known.get(stamp.path), existing.get(stamp.path, {}))
        self._flush()

    def _read_file(self, stamp: FileStamp, row: dict[str, Any] | None, existing: dict[str, Existing]) -> None:
        try:
            digest = _hash_file(stamp.absolute)
        except OSError as error:
            self._cannot_open(stamp, row, existing, (error.strerror or str(error)).lower())
            return
        if row is not None and row["content_hash"] == digest:
            before = None if (row["error"] or "").startswith(CANNOT_OPEN) else row["error"]
            same = {**row, "size": stamp.size, "mtime_ns": self._certain_mtime(stamp), "error": before}
            self._records.append(same)
            self._count_unchanged(same)
            self._step()
            return
        file = FileInHand(stamp, digest, row is None, existing)
        for document in self._documents(file):
            self._add(document, file)
        self._finish(file)

    def _cannot_open(
        self, stamp: FileStamp, row: dict[str, Any] | None, existing: dict[str, Existing], reason: str
    ) -> None:
        """Note it, keep what is known of the file, and try again at every update."""
        # Its content may still be what was read: rows stay, and are not encoded again if that turns out to be so.
        file = FileInHand(
            stamp, row["content_hash"] if row else None, row is None, existing, error=CANNOT_OPEN + reason
        )
        for rows in existing.values():
            file.keep(rows)
        self._finish(file)

    def _documents(self, file: FileInHand) -> Iterator[Document]:
        """The documents of a file; whatever goes wrong is noted and never stops the rest."""
        problems: list[ReadProblem] = []
        try:
            for document in read_documents(file.stamp, text_field=self._settings["text_field"], problems=problems):
                file.documents += 1
                yield document
        except ReadError as error:
            file.error = error.reason
        self._report.problems.extend(problems)

    def _add(self, document: Document, file: FileInHand) -> None:
        digest = document_hash(document)
        pieces = pieces_of(document, digest, file)
        existing = file.existing.get(document.id)
        if existing is not None and existing.is_complete(digest, pieces[-1].start if pieces else 0):
            file.keep(existing)
            self._kept += [(row_id, file.stamp) for row_id in existing.ids]
            self._report.kept_chunks += len(existing.ids)
            return
        for piece in pieces:
            self._pieces.append(piece)
            self._characters += len(piece.text)
            if len(self._pieces) >= BATCH_PIECES or self._characters >= BATCH_CHARACTERS:
                self._flush()

    def _finish(self, file: FileInHand) -> None:
        if file.error is not None:
            self._report.problems.append(ReadProblem(file.stamp.path, file.error))
        if file.error is not None and not file.documents:
            self._report.failed += 1
        elif file.is_new:
            self._report.added += 1
        else:
            self._report.changed += 1
        self._report.empty += file.error is None and not file.documents
        self._finished.append(file)
        self._step()
        if len(self._finished) >= 4 * BATCH_PIECES:  # many files without text fill no batch
            self._flush()

    def _step(self) -> None:
        self._done += 1
        self._progress(self._done, self._to_do)

    # Writing ------------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        """Commit: first the rows, then what they replace goes, and only then the files count as done."""
        pieces, self._pieces, self._characters = self._pieces, [], 0
        if pieces:
            self._write(pieces, self._encode(pieces))
        if self._store is None:  # no text yet, so there is no index either; the records wait
            return
        finished, self._finished = self._finished, []
        self._store.delete_ids([one for file in finished for one in file.stale()])
        if self._kept:
            self._store.amend(amended(self._kept))
        records = self._records + [self._record(file) for file in finished]
        self._store.put_files(file_rows(records))
        self._kept, self._records = [], []

    def _record(self, file: FileInHand) -> dict[str, Any]:
        return {
            "path": file.stamp.path,
            "size": file.stamp.size,
            "mtime_ns": -1 if (file.error or "").startswith(CANNOT_OPEN) else self._certain_mtime(file.stamp),
            "content_hash": file.digest,
            "chunks": file.chunks,
            "error": file.error,
        }

    def _certain_mtime(self, stamp: FileStamp) -> int:
        # A file written just before the scan may be written again without a new time: let the next run hash it.
        return stamp.mtime_ns if stamp.mtime_ns < self._started_ns - UNCERTAIN_NS else -1

    def _encode(self, pieces: list[Piece]) -> ChunkEmbeddings:
        if self._encoder is None:
            self._encoder = self._encoder_factory()
            if self._store is not None:
                self._index.check(self._encoder)
        return self._encoder.encode_chunks([piece.text for piece in pieces], heads=True)

    def _write(self, pieces: list[Piece], encoded: ChunkEmbeddings) -> None:
        if self._store is None:
            self._store = self._create(encoded)
        rows = chunk_rows(pieces, encoded, self._store.meta)
        self._store.upsert(rows)
        self._report.chunks += rows.num_rows
        for piece, row_id in zip((pieces[i] for i in encoded.owner.tolist()), rows["id"].to_pylist(), strict=True):
            piece.file.chunks += 1
            if piece.file.existing:
                piece.file.live.add(row_id)
        if self._store.meta.sample_rows < SAMPLE_ENOUGH and is_local(self._index.uri):
            self._centre_again(self._store)

    def _create(self, encoded: ChunkEmbeddings) -> Store:
        encoder = self._encoder
        assert encoder is not None
        meta = IndexMeta(encoder.name, encoder.fingerprint, encoder.dim, encoder.head_shape, settings=self._settings)
        if encoded.heads is not None:
            meta = with_statistics(meta, encoded.heads)
        options = self._index.storage_options
        replacing = Store.exists(self._index.uri, storage_options=options)
        store = Store.create(self._index.uri, meta, storage_options=options, overwrite=replacing)
        self._index.adopt(store)
        return store

    def _centre_again(self, store: Store) -> None:
        """An index begun with a handful of texts gets a better mean as it grows; nothing is encoded again.

        Only on a local disk, where the lock keeps other writers out: this replaces the table in one commit.
        """
        if store.meta.head_mean is None or store.count() < 2 * store.meta.sample_rows:
            return
        store.recreate(*centred_again(store.rows(store.columns), store.meta))

    def _no_text(self, to_do: Sequence[FileStamp]) -> str:
        reasons = "; ".join(str(problem) for problem in self._report.problems[:5]) or "they hold no text"
        return f"Nothing to index: {len(to_do):,} files were read and gave no text ({reasons})."


def _is_unchanged(stamp: FileStamp, row: dict[str, Any] | None) -> bool:
    return row is not None and row["size"] == stamp.size and row["mtime_ns"] == stamp.mtime_ns


def _hash_file(path: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
