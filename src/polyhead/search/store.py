"""The rows of an index, durably: LanceDB tables in a local folder or an object store, opened the one safe way."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from polyhead.errors import IndexStorageError, InputError
from polyhead.search.faults import is_conflict, story, told
from polyhead.search.filters import compile_filter, is_one_of
from polyhead.search.schema import CHUNKS, FILES, IndexMeta, chunk_schema, files_schema

if TYPE_CHECKING:
    from polyhead.search.planner import SearchLimits, StoredView

__all__ = ["Store", "is_local"]

IDS_AT_ONCE = 2_000
_ATTEMPTS = 6
_SETTINGS_KEY = "polyhead:settings"
_T = TypeVar("_T")


def is_local(uri: str) -> bool:
    """Whether ``uri`` is a folder of this machine and not an object store (``s3://``, ``gs://``, ``az://``, ...)."""
    return "://" not in uri


class Store:
    """The tables of one index. Make one with :meth:`open` or :meth:`create`; safe to share between threads, not forks.

    Reads always see the newest committed version, also one that another process wrote. Every write is one atomic
    commit. LanceDB's own rules are kept here: a primary key on ids, filters before the search, no default index.

    Args:
        uri: folder, or address in an object store.
        storage_options: passed to the object store (keys, endpoint, region).
    """

    def __init__(self, uri: str, storage_options: dict[str, str] | None, chunks: Any, connection: Any) -> None:
        self.uri = uri
        self.storage_options = storage_options
        self._chunks = chunks
        self._connection = connection
        self._files_table: Any = None
        self.views: dict[Any, Any] = {}  # the views of whole tables opened last, by version
        self._meta = IndexMeta.from_metadata(chunks.schema.metadata, uri)

    @classmethod
    def open(cls, uri: str, *, storage_options: dict[str, str] | None = None) -> Store:
        """Open an existing index.

        Raises:
            InputError: there is none at ``uri``.
            IndexMismatchError: it has another format version.
            IndexStorageError: it is damaged, foreign or may not be read.
        """
        if not cls.exists(uri, storage_options=storage_options):
            raise InputError(
                f"There is no index at {uri}. Make one with: polyhead index PATH"
                + (f" --index {uri}" if is_local(uri) else "")
            )
        with told(uri, "opened"):
            connection = _connect(uri, storage_options)
            chunks = connection.open_table(CHUNKS)
        store = cls(uri, storage_options, chunks, connection)
        store._meta = replace(store._meta, settings=store._settings())
        return store

    @classmethod
    def exists(cls, uri: str, *, storage_options: dict[str, str] | None = None) -> bool:
        """Whether an index was ever committed at ``uri``; a folder where the very first commit was cut off has none."""
        if is_local(uri):
            versions = Path(uri, f"{CHUNKS}.lance", "_versions")
            try:
                return any(name.endswith(".manifest") for name in os.listdir(versions))
            except FileNotFoundError:
                return False
            except OSError as error:
                raise IndexStorageError(story(uri, "opened", error)) from error
        with told(uri, "opened"):
            return CHUNKS in _names(_connect(uri, storage_options))

    @classmethod
    def create(
        cls, uri: str, meta: IndexMeta, *, storage_options: dict[str, str] | None = None, overwrite: bool = False
    ) -> Store:
        """Make an empty index, or with ``overwrite`` replace one in a single commit.

        Raises:
            InputError: ``uri`` is a folder with other things in it, or already an index.
            IndexStorageError: it cannot be written.
        """
        if is_local(uri):
            refuse_foreign_folder(uri)
        if not overwrite and cls.exists(uri, storage_options=storage_options):
            raise InputError(f"There is already an index at {uri}. Open it, or make it anew with --rebuild.")
        with told(uri, "written"):
            connection = _connect(uri, storage_options)
            # Files first: if this is cut off between the two, files are read again, and none is taken for done.
            again = FILES in _names(connection)
            connection.create_table(FILES, schema=files_schema(), mode="overwrite" if again else "create")
            mode = "overwrite" if overwrite else "create"
            chunks = connection.create_table(CHUNKS, schema=chunk_schema(meta), mode=mode)
        store = cls(uri, storage_options, chunks, connection)
        store.put_settings(meta.settings)
        return store

    @property
    def meta(self) -> IndexMeta:
        """What the index was made with."""
        return self._meta

    @property
    def columns(self) -> list[str]:
        """Names of the columns of chunks."""
        return chunk_schema(self._meta).names

    @property
    def version(self) -> int:
        """Number of the newest commit to the chunks."""
        with told(self.uri, "read"):
            return int(self._chunks.version)

    @property
    def _files(self) -> Any:
        if self._files_table is None:
            with told(self.uri, "opened"):
                there = FILES in _names(self._connection)
                self._files_table = (
                    self._connection.open_table(FILES)
                    if there
                    else self._connection.create_table(FILES, schema=files_schema())
                )
        return self._files_table

    def _settings(self) -> dict[str, Any]:
        if FILES not in _names(self._connection):  # cut off while it was made
            return {}
        with told(self.uri, "read"):
            metadata = self._files.schema.field("path").metadata or {}
        return dict(json.loads(metadata.get(_SETTINGS_KEY.encode(), b"{}")))

    @property
    def connection(self) -> Any:
        """LanceDB's connection, for the tables that stand beside the chunks."""
        return self._connection

    def table_names(self) -> set[str]:
        """Names of the tables at ``uri``."""
        with told(self.uri, "read"):
            return _names(self._connection)

    def count(self, where: str | None = None) -> int:
        """How many chunks there are, or how many pass a filter (:func:`compile_filter`)."""
        with told(self.uri, "read"):
            return int(self._chunks.count_rows(compile_filter(where)))

    # Writing ------------------------------------------------------------------------------------------------------

    def upsert(self, rows: pa.Table) -> None:
        """Insert rows of :func:`chunk_schema`, replacing those with the same id; one commit."""
        self.merge_rows(self._chunks, "id", rows)

    def amend(self, columns: pa.Table) -> None:
        """Replace some columns (``id`` and others) of existing rows; one commit; unknown ids are left out."""
        self._commit(lambda: self._chunks.merge_insert("id").when_matched_update_all().execute(columns))

    def delete_ids(self, ids: Sequence[str]) -> None:
        """Remove chunks by id."""
        self.delete_rows(self._chunks, "id", ids)

    def delete_paths(self, paths: Sequence[str]) -> None:
        """Remove all chunks of files."""
        self.delete_rows(self._chunks, "path", paths)

    def put_files(self, rows: pa.Table) -> None:
        """Record what became of files; replaces earlier records of the same paths."""
        self.merge_rows(self._files, "path", rows)

    def delete_files(self, paths: Sequence[str]) -> None:
        """Forget files."""
        self.delete_rows(self._files, "path", paths)

    def recreate(self, meta: IndexMeta, rows: pa.Table) -> None:
        """Replace all chunks and the meta data in one commit; files stay."""
        with told(self.uri, "written"):
            table = rows.replace_schema_metadata(meta.to_metadata())
            self._chunks = self._connection.create_table(
                CHUNKS, data=table, schema=chunk_schema(meta), mode="overwrite"
            )
        self._meta = meta

    def put_settings(self, settings: dict[str, Any]) -> None:
        """Replace ``meta.settings``; one commit."""
        packed = {_SETTINGS_KEY: json.dumps(settings, sort_keys=True)}
        self._commit(lambda: self._files.update_field_metadata({"path": "path", "metadata": packed}))
        self._meta = replace(self._meta, settings=settings)

    def merge_rows(self, table: Any, key: str, rows: pa.Table) -> None:
        """Insert rows into a table of this index, replacing those with the same ``key``; one commit."""
        if rows.num_rows:
            merge = table.merge_insert(key).when_matched_update_all().when_not_matched_insert_all()
            self._commit(lambda: merge.execute(rows))

    def delete_rows(self, table: Any, column: str, values: Sequence[str]) -> None:
        """Remove the rows of a table of this index that have one of ``values`` in ``column``."""
        for start in range(0, len(values), IDS_AT_ONCE):
            some = is_one_of(column, values[start : start + IDS_AT_ONCE])
            self._commit(lambda some=some: table.delete(some))  # type: ignore[misc]

    def _commit(self, write: Callable[[], _T]) -> _T:
        """Run a write; where another process committed first and the two cannot be joined, run it again."""
        for attempt in range(_ATTEMPTS):
            try:
                return write()
            except Exception as error:
                if attempt == _ATTEMPTS - 1 or not is_conflict(error):
                    raise IndexStorageError(story(self.uri, "written", error)) from error
                time.sleep(0.05 * 2**attempt)
        raise AssertionError  # the loop returns or raises

    # Reading ------------------------------------------------------------------------------------------------------

    def files(self, paths: Sequence[str] | None = None) -> pa.Table:
        """The records of all files (:func:`files_schema`), or of those at ``paths``."""
        with told(self.uri, "read"):
            if paths is None:
                return self._files.to_arrow()
            if not paths:
                return files_schema().empty_table()
            return self._files.search().where(is_one_of("path", paths), prefilter=True).to_arrow()

    def rows(self, columns: Sequence[str], sql: str | None = None) -> pa.Table:
        """Some columns of all chunks that pass ``sql`` (as :func:`compile_filter` gives it)."""
        with told(self.uri, "read"):
            query = self._chunks.search().select(list(columns))
            return (query.where(sql, prefilter=True) if sql else query).to_arrow()

    def paths(self) -> set[str]:
        """The paths that have chunks."""
        return set(self.rows(["path"])["path"].unique().to_pylist())

    def view(self, where: str | None = None, *, limits: SearchLimits | None = None) -> StoredView:
        """The newest version of the rows that pass a filter, ready to search; later writes do not change it."""
        from polyhead.search.planner import open_view

        return open_view(self, where, limits)

    def snapshot(self) -> Any:
        """A handle on the newest version of the chunks that stays at that version."""
        with told(self.uri, "read"):
            return self._connection.open_table(CHUNKS, version=self._chunks.version)

    # Upkeep -------------------------------------------------------------------------------------------------------

    def tidy(self, *, exact_rows: int, force: bool = False) -> list[str]:
        """Join small files, drop versions older than a day, and keep indexes where the table is large.

        Args:
            exact_rows: from so many rows on vectors get an index (IVF_SQ); below, search is exact.
            force: also where few commits were made since the last time.

        Returns:
            What was done, in words.
        """
        from polyhead.search.upkeep import tidy

        with told(self.uri, "written"):
            return tidy(self._chunks, self._files, exact_rows=exact_rows, force=force)


def refuse_foreign_folder(uri: str) -> None:
    """Raise InputError where ``uri`` is a file, or a folder that holds things but no index."""
    folder = Path(uri)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{uri} is a file, expected a folder for the index. Name another with --index.")
    ours = {f"{CHUNKS}.lance", f"{FILES}.lance"}
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise IndexStorageError(story(uri, "opened", error)) from error
    others = [name for name in names if not name.startswith(".")]
    if others and not ours & set(names):
        raise InputError(
            f"{uri} is a folder with other things in it ({', '.join(sorted(others)[:3])}, ...), not an index. "
            "Name a new or empty folder with --index."
        )


def _connect(uri: str, storage_options: dict[str, str] | None) -> Any:
    import lancedb

    # Without an interval a reader never sees what other processes write.
    return lancedb.connect(uri, read_consistency_interval=timedelta(0), storage_options=storage_options)


def _names(connection: Any) -> set[str]:
    names: set[str] = set()
    page = connection.list_tables()
    while True:
        names.update(page.tables)
        if not page.page_token:
            return names
        page = connection.list_tables(page_token=page.page_token)
