"""Read one file as documents, whatever its kind; the reader of each kind is imported when first needed."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
from collections.abc import Callable, Iterator

from polyhead.errors import InputError, ReadError
from polyhead.search.ingest.document import Document, FileStamp, ProblemLog, ReadProblem, clean
from polyhead.search.ingest.encoding import TRUNCATED

__all__ = ["read_documents"]

Reader = Callable[[FileStamp, str, ProblemLog], Iterator[Document]]

_READERS = {
    "txt": "plain:read_plain",
    "md": "markdown:read_markdown",
    "rst": "rst:read_rst",
    "html": "html:read_html",
    "pdf": "pdf:read_pdf",
    "docx": "docx:read_docx",
    "json": "records:read_json",
    "jsonl": "records:read_jsonl",
    "csv": "tables:read_csv",
    "tsv": "tables:read_tsv",
    "py": "python:read_python",
}


def read_documents(
    stamp: FileStamp, *, text_field: str = "text", problems: list[ReadProblem] | None = None
) -> Iterator[Document]:
    """The documents of a file, in order, lazily.

    Args:
        stamp: a file from ``scan``.
        text_field: the field of a record that holds its text (json, jsonl, csv, tsv). Where a record lacks the default
            ``"text"``, the first of ``body``, ``content``, ``contents``, ``abstract``, ``description``, ``summary``
            serves, or at last its title.
        problems: filled with what could not be read inside a file that can (record, line, page) and with caveats
            (a guessed encoding, an id used twice). Without a list, the first loss raises instead.

    Raises:
        ReadError: the file as a whole cannot be read: damaged, encrypted, without a text layer, binary, gone, not
            permitted, or none of its records has a text. May come after some documents were yielded.
    """
    if stamp.kind not in _READERS:
        raise InputError(f"no reader for kind {stamp.kind!r} of {stamp.path}: expected one of {', '.join(_READERS)}")
    log = ProblemLog(stamp.path, problems)
    return _guarded(stamp, _reader(stamp.kind)(stamp, text_field, log))


def _reader(kind: str) -> Reader:
    module, function = _READERS[kind].split(":")
    reader: Reader = getattr(importlib.import_module(f"polyhead.search.ingest.{module}"), function)
    return reader


def _guarded(stamp: FileStamp, documents: Iterator[Document]) -> Iterator[Document]:
    """The documents in clean Unicode; what the operating system or gzip complains of becomes a ``ReadError``."""
    try:
        for document in documents:
            yield _cleaned(document)
    except FileNotFoundError:
        raise ReadError(stamp.path, "the file is gone; it was there when the folder was scanned") from None
    except PermissionError:
        raise ReadError(stamp.path, "permission denied: this user may not read it") from None
    except (gzip.BadGzipFile, *TRUNCATED) as error:
        raise ReadError(stamp.path, f"damaged gzip data ({error})") from error
    except OSError as error:
        raise ReadError(stamp.path, (error.strerror or str(error)).lower()) from error


def _cleaned(document: Document) -> Document:
    return dataclasses.replace(
        document,
        id=clean(document.id),
        text=clean(document.text),
        title=None if document.title is None else clean(document.title),
        attributes={
            clean(name): clean(value) if isinstance(value, str) else value
            for name, value in document.attributes.items()
        },
        headings=tuple((offset, clean(heading)) for offset, heading in document.headings),
    )
