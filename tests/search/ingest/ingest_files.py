"""Makers of test files: nothing binary is kept in the repository."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from polyhead.search.ingest import Document, FileStamp, ReadProblem, read_documents, scan


def stamp_of(path: Path) -> FileStamp:
    (stamp,) = scan(path).files
    return stamp


def write(folder: Path, name: str, content: str | bytes) -> FileStamp:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return stamp_of(path)


def read(stamp: FileStamp, text_field: str = "text") -> tuple[list[Document], list[ReadProblem]]:
    problems: list[ReadProblem] = []
    documents = list(read_documents(stamp, text_field=text_field, problems=problems))
    for document in documents:
        for offset, heading in document.headings:
            assert 0 <= offset < len(document.text), heading
    return documents, problems


def read_one(stamp: FileStamp) -> Document:
    documents, problems = read(stamp)
    assert problems == []
    (document,) = documents
    return document


def pdf_bytes(pages: Sequence[Sequence[str]], information: str = "") -> bytes:
    """A PDF from its definition (ISO 32000): each page a list of lines in Helvetica."""
    count = len(pages)
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(count))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {count} >>".encode())
    objects.append(b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    for i, lines in enumerate(pages):
        resources = "<< /Font << /F1 3 0 R >> >>"
        place = f"/Parent 2 0 R /MediaBox [0 0 612 792] /Resources {resources} /Contents {5 + 2 * i} 0 R"
        objects.append(f"<< /Type /Page {place} >>".encode())
        drawn = " T* ".join(f"({line}) Tj" for line in lines)
        stream = f"BT /F1 12 Tf 14 TL 72 720 Td {drawn} ET".encode("latin-1")
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    objects.append(f"<< {information} >>".encode())
    out, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R >>"
    return out + f"trailer\n{trailer}\nstartxref\n{start}\n%%EOF\n".encode()
