"""PDF to text, by pypdf."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

from polyhead.errors import ReadError
from polyhead.search.ingest.document import Document, FileStamp, ProblemLog, Scalar, TextBuilder, one_line
from polyhead.search.ingest.encoding import read_bytes
from polyhead.search.ingest.plain import file_title

if TYPE_CHECKING:
    from pypdf import PdfReader

__all__ = ["read_pdf"]

_LIGATURES = str.maketrans({"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st", "\0": None})
_HYPHENATED = re.compile(r"(?<=[^\W\d_])(?:-|\u00ad)\n(?=[^\W\d_])(?=(.))")
_NO_TITLE = re.compile(r"(?i)\s*(?:untitled.*|microsoft word - .*|.*\.(?:docx?|dvi|tex|indd|qxd|pptx?))?\s*")


def read_pdf(stamp: FileStamp, text_field: str, log: ProblemLog) -> Iterator[Document]:
    """One document. Title: of the file's metadata, else the file's name. Headings: the bookmarks where there are
    any, else ``page 1``, ``page 2`` ... Words broken at line ends are joined."""
    data = read_bytes(stamp)
    if not data:
        return
    with _quiet():
        reader = _open(data, stamp)
        builder = TextBuilder()
        starts = _pages(reader, builder, log)
        if not builder.text:
            raise ReadError(
                stamp.path,
                f"no text in {len(starts)} page{'s'[: len(starts) != 1]} (scanned images?): run text recognition "
                "first, for example ocrmypdf",
            )
        attributes = _metadata(reader)
        headings = _bookmarks(reader, builder.text, starts) or builder.headings
    title = str(attributes.pop("title", ""))
    if _NO_TITLE.fullmatch(title):
        title = file_title(stamp)
    attributes["pages"] = len(starts)
    yield Document(stamp.path, builder.text, stamp.path, title, stamp.kind, attributes, headings)


def _open(data: bytes, stamp: FileStamp) -> PdfReader:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError

    try:
        reader = PdfReader(BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise ReadError(stamp.path, "encrypted: it opens only with a password; save it without one")
        len(reader.pages)
        return reader
    except ReadError:
        raise
    except DependencyError as error:
        raise ReadError(stamp.path, "encrypted with AES: to read it, pip install cryptography") from error
    except Exception as error:  # pypdf raises whatever its parser stumbles over
        raise ReadError(stamp.path, f"damaged PDF ({_said(error)})") from error


def _pages(reader: PdfReader, builder: TextBuilder, log: ProblemLog) -> list[int]:
    """Adds the pages' texts to the builder; returns the offset at which each page begins."""
    starts: list[int] = []
    count = len(reader.pages)
    for number in range(count):
        starts.append(builder.next_offset)
        try:
            text = reader.pages[number].extract_text()
        except Exception as error:  # as above; the other pages may be sound
            log.lost(f"page {number + 1} of {count} is damaged ({_said(error)})")
            continue
        text = _HYPHENATED.sub(_join, text.translate(_LIGATURES))
        if text.strip() and count > 1:
            builder.mark(f"page {number + 1}")
        builder.block(text)
    return starts


def _join(found: re.Match[str]) -> str:
    return "" if found[1].islower() else "-"


def _metadata(reader: PdfReader) -> dict[str, Scalar]:
    fields: dict[str, Scalar] = {}
    try:
        information: Any = reader.metadata or {}
        for name in ("title", "author", "subject", "keywords"):
            value = one_line(str(information.get(f"/{name.capitalize()}") or ""))
            if value:
                fields[name] = value
        created = reader.metadata.creation_date if reader.metadata is not None else None
        if created is not None:
            fields["created"] = created.isoformat()
        language = reader.root_object.get("/Lang")
        if language:
            fields["language"] = str(language)
    except Exception:  # damaged metadata is no reason to lose the text
        return fields
    return fields


def _bookmarks(reader: PdfReader, text: str, starts: list[int]) -> tuple[tuple[int, str], ...]:
    """Bookmarks at the place on their page where their words stand, else at the top of the page."""
    headings: list[tuple[int, str]] = []
    try:
        pending: list[Any] = list(reversed(reader.outline))
        while pending:
            entry = pending.pop()
            if isinstance(entry, list):
                pending.extend(reversed(entry))
                continue
            page, title = reader.get_destination_page_number(entry), one_line(str(entry.title or ""))
            if page is None or page < 0 or not title:
                continue
            end = starts[page + 1] if page + 1 < len(starts) else len(text)
            found = re.compile(r"\s+".join(map(re.escape, title.split())), re.I).search(text, starts[page], end)
            headings.append((found.start() if found else starts[page], title))
    except Exception:  # damaged bookmarks: the page numbers serve
        return ()
    return tuple(sorted((one for one in headings if one[0] < len(text)), key=lambda one: one[0]))


def _said(error: Exception) -> str:
    return one_line(f"{type(error).__name__}: {error}")[:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """pypdf logs every oddity it repairs; what cannot be repaired is reported by us."""
    logger = logging.getLogger("pypdf")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
