"""PDF and Word files, made by the tests themselves."""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path

import docx
import pytest
from ingest_files import pdf_bytes, read, read_one, write
from pypdf import PdfReader, PdfWriter

from polyhead.errors import InputError
from polyhead.search.ingest import FileStamp, ReadError, read_documents

PAGES = [["A story of long effi-", "cacy and of X-", "Rays."], ["Second chapter", "More words here."], ["The end."]]
INFORMATION = "/Title (The Book) /Author (Ada  Byron) /CreationDate (D:20240501120000Z)"


def rewritten(data: bytes, change: str = "", **options: str) -> bytes:
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(data)))
    if change == "encrypt":
        writer.encrypt(**options)
    if change == "bookmarks":
        writer.add_outline_item(title="Start", page_number=0)
        chapter = writer.add_outline_item(title="second  Chapter", page_number=1)
        writer.add_outline_item(title="words", page_number=1, parent=chapter)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_pdf_text_title_and_pages(tmp_path: Path) -> None:
    document = read_one(write(tmp_path, "a.pdf", pdf_bytes(PAGES, INFORMATION)))
    assert document.text == "A story of long efficacy and of X-Rays.\n\nSecond chapter\nMore words here.\n\nThe end."
    assert document.title == "The Book"
    assert document.attributes == {"author": "Ada Byron", "created": "2024-05-01T12:00:00+00:00", "pages": 3}
    assert [heading for _, heading in document.headings] == ["page 1", "page 2", "page 3"]
    assert document.heading_at(document.text.index("Second")) == "page 2"
    assert document.heading_at(document.text.index("Second") - 1) == "page 1"


@pytest.mark.parametrize(
    "title", ["", "/Title (untitled)", "/Title (Microsoft Word - draft.doc)", "/Title (report.tex)"]
)
def test_a_pdf_without_a_real_title_takes_the_name_of_the_file(tmp_path: Path, title: str) -> None:
    document = read_one(write(tmp_path, "My report.pdf", pdf_bytes([["One page"]], title)))
    assert document.title == "My report"
    assert document.headings == ()


def test_pdf_bookmarks_are_headings_where_their_words_stand(tmp_path: Path) -> None:
    document = read_one(write(tmp_path, "a.pdf", rewritten(pdf_bytes(PAGES), "bookmarks")))
    text = document.text
    assert document.headings == (
        (0, "Start"),
        (text.index("Second"), "second Chapter"),
        (text.index("words"), "words"),
    )


def test_encrypted_pdfs(tmp_path: Path) -> None:
    options = {"user_password": "secret", "algorithm": "RC4-128"}
    locked = rewritten(pdf_bytes(PAGES), "encrypt", **options)
    with pytest.raises(ReadError, match=r"encrypted.*password"):
        list(read_documents(write(tmp_path, "a.pdf", locked)))
    open_to_read = rewritten(pdf_bytes(PAGES), "encrypt", **{**options, "user_password": "", "owner_password": "x"})
    assert "efficacy" in read_one(write(tmp_path, "b.pdf", open_to_read)).text


def test_a_scanned_pdf_says_so(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"no text in 2 pages \(scanned images\?\).*ocrmypdf"):
        list(read_documents(write(tmp_path, "a.pdf", pdf_bytes([[], []])), problems=[]))


def test_damaged_pdfs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = pdf_bytes(PAGES)
    for content in (b"%PDF-1.4\nnothing", b"no pdf at all", whole[: len(whole) // 4], b"%PDF-1.4" + b"\0" * 100):
        with pytest.raises(ReadError, match="damaged PDF"):
            list(read_documents(write(tmp_path, "a.pdf", content), problems=[]))
    no_index = read_one(write(tmp_path, "b.pdf", whole[: whole.index(b"xref")] + whole[whole.index(b"trailer") :]))
    assert "The end." in no_index.text
    assert caplog.records == []
    assert logging.getLogger("pypdf").level == logging.NOTSET


def test_one_damaged_page_loses_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pypdf import PageObject

    real = PageObject.extract_text

    def extract(page: PageObject) -> str:
        text = real(page)
        if "Second" in text:
            raise KeyError("/Broken")
        return text

    monkeypatch.setattr(PageObject, "extract_text", extract)
    stamp = write(tmp_path, "a.pdf", pdf_bytes(PAGES))
    (document,), (problem,) = read(stamp)
    assert document.text.endswith("X-Rays.\n\nThe end.")
    assert document.heading_at(len(document.text) - 1) == "page 3"
    assert "page 2 of 3 is damaged (KeyError" in problem.reason
    assert problem.lost
    with pytest.raises(ReadError, match="page 2 of 3"):
        list(read_documents(stamp))


def word(title: str = "", *, properties: bool = True) -> bytes:
    document = docx.Document()
    document.core_properties.title = title
    document.core_properties.author = "Ada"
    document.add_paragraph("Before it all.")
    document.add_heading("First part", 1)
    document.add_paragraph("Some words.")
    document.add_paragraph("alpha", style="List Bullet")
    document.add_paragraph("beta", style="List Bullet")
    table = document.add_table(2, 3)
    for row, cells in zip(table.rows, [("A", "B", "C"), ("1", "2\n3", "4")], strict=True):
        for cell, text in zip(row.cells, cells, strict=True):
            cell.text = text
    table.cell(0, 1).merge(table.cell(0, 2))
    document.add_heading("Second", 2)
    document.add_paragraph("")
    document.add_paragraph("The end.")
    out = io.BytesIO()
    document.save(out)
    if properties:
        return out.getvalue()
    return without(out.getvalue(), "docProps/core.xml", '<Relationship Id="rId3"')


def without(data: bytes, part: str, relationship: str) -> bytes:
    """The .docx without a part and without what refers to it."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "_rels/.rels":
                pieces = content.decode().split("<Relationship ")
                content = "<Relationship ".join(
                    one for one in pieces if "core-properties" not in one or one is pieces[0]
                ).encode()
                if b"</Relationships>" not in content:
                    content += b"</Relationships>"
            if name != part:
                new.writestr(name, content)
    return out.getvalue()


def test_docx_text_headings_and_metadata(tmp_path: Path) -> None:
    document = read_one(write(tmp_path, "a.docx", word("In the metadata")))
    assert document.text == (
        "Before it all.\n\nFirst part\n\nSome words.\n- alpha\n- beta\nA | B C\n1 | 2 3 | 4\n\nSecond\n\nThe end."
    )
    assert document.title == "First part"
    assert document.attributes["author"] == "Ada"
    assert [document.text[offset:].split("\n")[0] for offset, _ in document.headings] == ["First part", "Second"]


def test_docx_titles(tmp_path: Path) -> None:
    def made(name: str, *, titled: bool, metadata: str) -> FileStamp:
        document = docx.Document()
        document.core_properties.title = metadata
        document.add_paragraph("Body")
        if titled:
            document.add_heading("Later heading", 1)
            document.add_heading("The Title", 0)
        document.save(str(tmp_path / name))
        return write(tmp_path, name, (tmp_path / name).read_bytes())

    assert read_one(made("a.docx", titled=True, metadata="M")).title == "The Title"
    assert read_one(made("b.docx", titled=False, metadata="M")).title == "M"
    assert read_one(made("c.docx", titled=False, metadata="")).title == "c"
    bare = read_one(write(tmp_path, "d.docx", word(properties=False)))
    assert "author" not in bare.attributes


def test_damaged_docx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = word()
    for content in (b"no zip", whole[:2000], whole[:-30], pdf_bytes(PAGES)):
        with pytest.raises(ReadError, match=r"damaged \.docx"):
            list(read_documents(write(tmp_path, "a.docx", content)))
    with pytest.raises(ReadError, match=r"encrypted, or an old \.doc"):
        list(read_documents(write(tmp_path, "a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 600)))
    other_zip = io.BytesIO()
    with zipfile.ZipFile(other_zip, "w") as archive:
        archive.writestr("hello.txt", "x")
    with pytest.raises(ReadError, match=r"damaged \.docx"):
        list(read_documents(write(tmp_path, "a.docx", other_zip.getvalue())))
    monkeypatch.setattr("polyhead.search.ingest.docx._LARGEST", 1000)
    with pytest.raises(ReadError, match=r"unpacks to .* more than 1,000"):
        list(read_documents(write(tmp_path, "a.docx", whole)))


def test_an_empty_docx_has_no_documents(tmp_path: Path) -> None:
    docx.Document().save(str(tmp_path / "a.docx"))
    assert read(write(tmp_path, "a.docx", (tmp_path / "a.docx").read_bytes())) == ([], [])


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(InputError, match="no reader for kind 'odt' of a"):
        read_documents(FileStamp("a", "/a", "odt", 1, 1))
