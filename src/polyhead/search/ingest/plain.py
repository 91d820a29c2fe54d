"""Plain text: the file is the text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from polyhead.search.ingest.document import Document, FileStamp, ProblemLog, Scalar
from polyhead.search.ingest.encoding import Encoding, read_text

__all__ = ["encoding_attributes", "file_title", "read_plain"]


def read_plain(stamp: FileStamp, text_field: str, log: ProblemLog) -> Iterator[Document]:
    """One document: the text as it stands, titled with the name of the file."""
    text, encoding = read_text(stamp, log)
    if text.strip():
        yield Document(stamp.path, text, stamp.path, file_title(stamp), stamp.kind, encoding_attributes(encoding))


def file_title(stamp: FileStamp) -> str:
    """The name of the file without its suffix, for want of a better title."""
    return PurePosixPath(stamp.path).stem


def encoding_attributes(encoding: Encoding) -> dict[str, Scalar]:
    return {} if encoding.name.startswith("utf-8") else {"encoding": encoding.name}
