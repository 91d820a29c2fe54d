"""An index of documents: made once, then kept up to date by encoding only what changed."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead.errors import IndexMismatchError, InputError
from polyhead.paths import home
from polyhead.search.ingest import SUPPORTED, ReadProblem, ScanResult, scan

if TYPE_CHECKING:
    from polyhead.embed import Encoder
    from polyhead.search.late.store import Precision, TokenReport, TokenStore
    from polyhead.search.planner import SearchLimits, StoredView
    from polyhead.search.posted import Posted
    from polyhead.search.schema import IndexMeta
    from polyhead.search.store import Store

__all__ = ["Index", "UpdateReport", "default_index_uri"]

Progress = Callable[[int, "int | None"], None]


def default_index_uri(path: str | Path) -> str:
    """Where the index of a folder or file lives unless told otherwise: below :func:`polyhead.paths.home`."""
    absolute = os.path.abspath(os.path.expanduser(os.fspath(path)))
    digest = hashlib.sha256(absolute.encode(errors="surrogateescape")).hexdigest()[:12]
    name = "".join(c if c.isalnum() and c.isascii() else "-" for c in os.path.basename(absolute))[:40] or "root"
    return str(home() / "indexes" / f"{name}-{digest}")


@dataclass
class UpdateReport:
    """What one update did. Files are counted; ``problems`` names what could not be read, with the reason.

    Attributes:
        added, changed, removed, unchanged: files. A file that was touched and holds the same counts as unchanged.
        failed: files of which nothing could be read. They are tried again when they change, or at every update where
            even their bytes could not be read.
        empty: files read for the first time that hold no text.
        chunks: rows encoded and written by this update.
        kept_chunks: rows of new or changed files that were already there, and were not encoded again.
        total_chunks: rows the index now holds.
        problems: what could not be read, of this update's files and of the unchanged ones that failed before.
        skipped: files of kinds that are not read, counted by suffix.
        upkeep: what was done to keep the tables quick, in words.
        seconds: wall time.
    """

    added: int = 0
    changed: int = 0
    removed: int = 0
    unchanged: int = 0
    failed: int = 0
    empty: int = 0
    chunks: int = 0
    kept_chunks: int = 0
    total_chunks: int = 0
    problems: list[ReadProblem] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    upkeep: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {**vars(self), "problems": [str(problem) for problem in self.problems]}


class Index:
    """An index at ``uri``: a local folder, or an object store that LanceDB understands.

    Args:
        uri: where; :func:`default_index_uri` gives the default for a path.
        storage_options: credentials, endpoint or region of an object store.

    Example:
        >>> index = Index(default_index_uri("docs"))                        # doctest: +SKIP
        >>> report = index.update("docs", lambda: Encoder())                # doctest: +SKIP
        >>> report.added, report.total_chunks                               # doctest: +SKIP
        (12, 80)
    """

    def __init__(self, uri: str | Path, *, storage_options: dict[str, str] | None = None) -> None:
        self.uri = str(uri)
        self.storage_options = storage_options
        self._store: Store | None = None
        self._tokens: tuple[Store, TokenStore] | None = None

    @classmethod
    def open(cls, uri: str | Path, *, storage_options: dict[str, str] | None = None) -> Index:
        """Open an index that exists; errors as :meth:`polyhead.search.store.Store.open`."""
        index = cls(uri, storage_options=storage_options)
        _ = index.store
        return index

    @property
    def store(self) -> Store:
        """Its tables, opened when first needed; errors as :meth:`polyhead.search.store.Store.open`."""
        if self._store is None:
            from polyhead.search.store import Store

            self._store = Store.open(self.uri, storage_options=self.storage_options)
        return self._store

    def exists(self) -> bool:
        """Whether an index was ever committed here."""
        if self._store is not None:
            return True
        from polyhead.search.store import Store

        return Store.exists(self.uri, storage_options=self.storage_options)

    @property
    def meta(self) -> IndexMeta:
        """What the index was made with."""
        return self.store.meta

    def view(self, where: str | None = None, *, limits: SearchLimits | None = None) -> StoredView:
        """The rows that pass a filter (:func:`polyhead.search.filters.compile_filter`), ready to search."""
        return self.store.view(where, limits=limits)

    def check(self, encoder: Encoder) -> None:
        """Refuse an encoder that did not make this index.

        Raises:
            IndexMismatchError: other model files, pooling or layers.
        """
        meta = self.meta
        if encoder.fingerprint != meta.fingerprint:
            raise IndexMismatchError(
                f"The index {self.uri} was made with the model '{meta.model}' (fingerprint {meta.fingerprint[:12]}), "
                f"this is '{encoder.name}' (fingerprint {encoder.fingerprint[:12]}): their vectors cannot be compared. "
                f"Use --model {meta.model}, or make the index anew with: "
                f"polyhead index {self._path()} --model {encoder.name} --rebuild"
            )

    def update(
        self,
        path: str | Path,
        encoder_factory: Callable[[], Encoder],
        *,
        model: str | None = None,
        text_field: str | None = None,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        rebuild: bool = False,
        progress: Progress | None = None,
    ) -> UpdateReport:
        """Bring the index up to date with the files at ``path``; only new and changed documents are encoded.

        Written in batches, each committed: interrupted or killed, what was committed stays and the next run goes on
        from there. Settings left at None stay as the index was made.

        Args:
            path: a folder, or one file.
            encoder_factory: called only if there is something to encode.
            model: the model's name. Where it is the one the index was made with, nothing is loaded to compare.
            text_field: the field that holds the text in .json, .jsonl and .csv files; "text" at first.
            include, exclude: globs as :func:`polyhead.search.ingest.scan` takes them; an empty list means no globs.
            rebuild: make the index anew. The old one stays until the first batch of the new one is written.
            progress: called with files done and files to do.

        Raises:
            InputError: no such path, nothing there that can be read, or the index holds another folder's files.
            IndexMismatchError: the index was made with another model, format or text field.
            IndexBusyError: another process is writing it.
            IndexStorageError: it cannot be read or written.
        """
        from polyhead.search.update import Update

        started = time.perf_counter()
        with self._writing():
            exists = not rebuild and self.exists()
            settings = self._settings(exists, path, text_field, include, exclude)
            found = scan(path, include=settings["include"] or None, exclude=settings["exclude"] or None)
            settings["root"] = found.root
            if exists:
                self._check_model(model, encoder_factory)
            elif not found.files:
                raise InputError(_nothing_readable(path, found))
            report = Update(self, found, settings, encoder_factory, progress).run(exists)
        report.seconds = time.perf_counter() - started
        return report

    def put(self, documents: Sequence[Posted], encoder_factory: Callable[[], Encoder]) -> UpdateReport:
        """Put documents that come from no file into the index, each in the place of an earlier one of its id.

        Committed when it returns; :meth:`update` leaves them alone. The index is made where there is none.

        Args:
            documents: what to put; of two with one id, the later one counts.
            encoder_factory: called only if there is something to encode.

        Raises:
            InputError: no documents, or none with text in a new index. Others as :meth:`update`.
        """
        from polyhead.search.posted import put

        with self._writing():
            return put(self, documents, encoder_factory)

    def remove(self, ids: Sequence[str]) -> int:
        """Take documents that :meth:`put` put out of the index; gives how many there were. Committed when it returns.

        Raises:
            IndexBusyError: another process is writing it. IndexStorageError: it cannot be read or written.
        """
        from polyhead.search.posted import remove

        with self._writing():
            return remove(self, ids)

    @property
    def tokens(self) -> TokenStore:
        """Its token vectors, which late interaction searches with; there are none until they are asked for."""
        from polyhead.search.late.store import TokenStore

        if self._tokens is None or self._tokens[0] is not self.store:
            self._tokens = self.store, TokenStore(self.store)
        return self._tokens[1]

    def update_tokens(
        self, encoder: Encoder, *, precision: Precision = "float16", progress: Progress | None = None
    ) -> TokenReport:
        """Make the token vectors of all chunks, or bring them up to date; only new and changed chunks are encoded.

        Written in batches, each committed: interrupted or killed, the next run goes on from there. They take about
        ``2 * dim`` bytes a token (``dim`` in int8), many times the size of the rest of the index.

        Args:
            encoder: the one the index was made with.
            precision: "float16" or "int8", of the vectors, where there are none yet.
            progress: called with chunks done and to do.

        Raises:
            IndexMismatchError: another encoder than the index's. IndexBusyError: another process is writing it.
        """
        self.check(encoder)
        if self.tokens.exists() and not self.tokens.outdated():
            return self.tokens.report()
        with self._writing():
            return self.tokens.update(encoder, precision=precision, progress=progress)

    def adopt(self, store: Store) -> None:
        """Use ``store`` from now on (a new index replaced the old one)."""
        self._store = store

    @contextmanager
    def _writing(self) -> Iterator[None]:
        from polyhead.search.store import is_local, refuse_foreign_folder

        if not is_local(self.uri):
            yield
            return
        from polyhead.search.lock import writing

        refuse_foreign_folder(self.uri)
        with writing(self.uri):
            yield

    def _settings(
        self,
        exists: bool,
        path: str | Path,
        text_field: str | None,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
    ) -> dict[str, Any]:
        made = self.meta.settings if exists else {}
        if made.get("text_field") not in (None, text_field) and text_field is not None:
            raise IndexMismatchError(
                f"The index {self.uri} was made with --text-field {made['text_field']}, '{text_field}' was asked for. "
                f"Use the same, or make it anew with: polyhead index {path} --text-field {text_field} --rebuild"
            )
        return {
            "text_field": text_field or made.get("text_field") or "text",
            "include": list(made.get("include") or [] if include is None else include),
            "exclude": list(made.get("exclude") or [] if exclude is None else exclude),
        }

    def _check_model(self, model: str | None, encoder_factory: Callable[[], Encoder]) -> None:
        # Two names may mean one model (a folder and its hub id), so only the fingerprint decides.
        if model is not None and model != self.meta.model:
            self.check(encoder_factory())

    def _path(self) -> str:
        return str(self.meta.settings.get("root") or "PATH")


def _nothing_readable(path: str | Path, found: ScanResult) -> str:
    skipped = ", ".join(f"{count} {suffix}" for suffix, count in found.skipped.most_common(5)) or "no files at all"
    unreadable = "".join(f"; {problem}" for problem in found.unreadable[:3])
    return (
        f"Nothing to index at {path}: found {skipped}{unreadable}. Expected files of {' '.join(sorted(SUPPORTED))}; "
        "check the path and the --include and --exclude globs."
    )
