"""Plain text and the encodings it comes in."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest
from ingest_files import read, read_one, write

from polyhead.search.ingest import ReadError, read_documents

WORDS = "Привет, naïve café – 你好 🎉\nsecond line"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_unicode_encodings(tmp_path: Path, encoding: str) -> None:
    text = WORDS if encoding not in ("utf-16-le", "utf-16-be") else "Plain café words\nwithout a mark"
    document = read_one(write(tmp_path, "notes.txt", text.replace("\n", "\r\n").encode(encoding)))
    assert document.text == text
    assert (document.id, document.path, document.title, document.kind) == ("notes.txt", "notes.txt", "notes", "txt")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("naïve café", "latin-1"),
        ("Der Käse schmeckt über alles größer. Schöne Grüße", "latin-1"),
        ("It’s a “quoted” text – with dashes, 5 m² and 20 °C", "cp1252"),
        ("señor año niño mañana\n" * 40, "latin-1"),
        ("Привет, как дела? Это проверка кодировки", "cp1251"),
        ("日本語の文章です。これはテストです", "shift_jis"),
        ("zażółć gęślą jaźń to jest próba", "cp1250"),
    ],
)
def test_older_encodings_are_guessed_and_said(tmp_path: Path, text: str, encoding: str) -> None:
    (document,), (problem,) = read(write(tmp_path, "a.txt", text.encode(encoding)))
    assert document.text == text
    assert document.attributes["encoding"] == codecs.lookup(str(document.attributes["encoding"])).name
    assert not problem.lost
    assert "not UTF-8" in problem.reason


def test_a_damaged_utf8_file_keeps_its_other_letters(tmp_path: Path) -> None:
    (document,), (problem,) = read(write(tmp_path, "a.txt", "déjà vu ".encode() + b"\xff" + " naïve".encode()))
    assert document.text == "déjà vu \ufffd naïve"
    assert not problem.lost
    assert "1 place not valid utf-8" in problem.reason


@pytest.mark.parametrize("content", [b"\x7fELF\x02\0\0\0\x01 text", b"plain start\n" * 500 + b"\0\x01\x02"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.rst", "a.html", "a.csv", "a.jsonl", "a.json", "a.py"])
def test_binary_under_a_text_name_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(ReadError, match=r"NUL|null bytes") as caught:
        list(read_documents(write(tmp_path, name, content)))
    assert caught.value.path == name


@pytest.mark.parametrize("content", [b"", b" \r\n\t\n", codecs.BOM_UTF8])
@pytest.mark.parametrize("suffix", ["txt", "md", "rst", "html", "csv", "tsv", "jsonl", "json", "py"])
def test_an_empty_file_has_no_documents_and_is_no_error(tmp_path: Path, suffix: str, content: bytes) -> None:
    assert read(write(tmp_path, f"empty.{suffix}", content)) == ([], [])


def test_an_empty_pdf_or_docx_has_no_documents(tmp_path: Path) -> None:
    assert read(write(tmp_path, "empty.pdf", b"")) == ([], [])
    assert read(write(tmp_path, "empty.docx", b"")) == ([], [])


def test_one_huge_line(tmp_path: Path) -> None:
    text = "wörd " * 1_000_000
    assert read_one(write(tmp_path, "a.txt", text)).text == text


def test_a_file_that_went_away_or_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = write(tmp_path, "a.txt", "text")
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", _raise(PermissionError(13, "Permission denied")))
        with pytest.raises(ReadError, match="permission denied"):
            list(read_documents(stamp))
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", _raise(OSError(5, "Input/output error")))
        with pytest.raises(ReadError, match="input/output error"):
            list(read_documents(stamp))
    Path(stamp.absolute).unlink()
    with pytest.raises(ReadError, match=r"a\.txt: the file is gone"):
        list(read_documents(stamp))


def _raise(error: OSError) -> object:
    def raising(*_: object, **__: object) -> None:
        raise error

    return raising
