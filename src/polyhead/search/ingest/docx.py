"""Word documents (.docx) to text, by python-docx."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from io import BytesIO
from typing import Any

from polyhead.errors import ReadError
from polyhead.search.ingest.document import Document, FileStamp, ProblemLog, Scalar, TextBuilder, one_line
from polyhead.search.ingest.encoding import read_bytes
from polyhead.search.ingest.plain import file_title

__all__ = ["read_docx"]

_LARGEST = 1 << 30  # bytes unpacked; a small file that claims more is a bomb


def read_docx(stamp: FileStamp, text_field: str, log: ProblemLog) -> Iterator[Document]:
    """One document: paragraphs, lists and tables in reading order. Title: the Title or first heading paragraph, else
    the file's metadata, else its name. python-docx reads neither footnotes, text boxes, headers nor footers."""
    data = read_bytes(stamp)
    if not data:
        return
    document = _open(data, stamp)
    builder = TextBuilder()
    try:
        titled = _blocks(document, builder)
        attributes = _metadata(document)
    except Exception as error:  # lxml and python-docx raise whatever damaged XML leads them to
        raise ReadError(stamp.path, f"damaged .docx ({type(error).__name__}: {error})") from error
    if not builder.text:
        return
    metadata_title = str(attributes.pop("title", ""))
    title = titled or (builder.headings[0][1] if builder.headings else metadata_title) or file_title(stamp)
    yield Document(stamp.path, builder.text, stamp.path, title, stamp.kind, attributes, builder.headings)


def _open(data: bytes, stamp: FileStamp) -> Any:
    import docx

    if data.startswith(b"\xd0\xcf\x11\xe0"):
        raise ReadError(stamp.path, "encrypted, or an old .doc under a new name: open it in Word and save it as .docx")
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > _LARGEST:
            raise ReadError(stamp.path, f"unpacks to {unpacked:,} bytes, more than {_LARGEST:,}: not read")
        return docx.Document(BytesIO(data))
    except ReadError:
        raise
    except Exception as error:
        raise ReadError(stamp.path, f"damaged .docx ({type(error).__name__}: {error})") from error


def _blocks(document: Any, builder: TextBuilder) -> str:
    """Adds the document's blocks to the builder; returns the text of its Title paragraph, if any."""
    from docx.table import Table

    title = ""
    for block in document.iter_inner_content():
        if isinstance(block, Table):
            for row in _rows(block):
                builder.block(row, tight=True)
            continue
        text = block.text.strip()
        style = (block.style.name or "") if block.style is not None else ""
        if style == "Title" or style.startswith("Heading"):
            title = title or (one_line(text) if style == "Title" else "")
            builder.heading(text)
        elif text and style.startswith("List"):
            builder.block(f"- {text}", tight=True)
        else:
            builder.block(text)
    return title


def _rows(table: Any) -> Iterator[str]:
    for row in table.rows:
        cells: list[str] = []
        previous = None
        for cell in row.cells:
            if cell._tc is not previous:  # python-docx repeats a merged cell for each column it spans
                cells.append(one_line(cell.text))
            previous = cell._tc
        if any(cells):
            yield " | ".join(cells)


def _metadata(document: Any) -> dict[str, Scalar]:
    from docx.opc.constants import RELATIONSHIP_TYPE

    try:
        document.part.package.part_related_by(RELATIONSHIP_TYPE.CORE_PROPERTIES)
    except KeyError:  # python-docx would invent some
        return {}
    core = document.core_properties
    fields: dict[str, Scalar] = {}
    for name in ("title", "author", "subject", "keywords", "language"):
        value = one_line(getattr(core, name) or "")
        if value:
            fields[name] = value
    if core.created is not None:
        fields["created"] = core.created.isoformat()
    return fields
