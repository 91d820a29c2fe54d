"""Python sources: a document a docstring, never imported."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest
from ingest_files import read, stamp_of, write

from polyhead.search.ingest import Document, ReadError, read_documents, scan

SOURCE = '''"""About the module.

    Indented more.
"""
raise SystemExit("imported!")
pattern = "\\d"


class Tea(Drink[int], metaclass=Meta):
    """A cup."""

    @property
    def hot(self) -> bool:
        """Is it hot?"""

    @hot.setter
    def hot(self, value: bool) -> None:
        """Make it hot."""

    def silent(self): ...

    if True:
        async def brew(self, *, minutes: float = 3.5, **rest) -> "Tea":
            """Wait."""
            def inner():
                """Deep down."""


try:
    def late(a, b=(1, 2), /): "One line."
except ImportError:
    def late(): "Another."
'''


def test_every_docstring_becomes_a_document(tmp_path: Path) -> None:
    write(tmp_path, "pkg/__init__.py", "")
    documents, problems = read(write(tmp_path, "pkg/tea.py", SOURCE))
    assert problems == []
    assert [(one.id, one.attributes["object"]) for one in documents] == [
        ("tea.py", "module"),
        ("tea.py::Tea", "class"),
        ("tea.py::Tea.hot", "method"),
        ("tea.py::Tea.hot~2", "method"),
        ("tea.py::Tea.brew", "method"),
        ("tea.py::Tea.brew.<locals>.inner", "function"),
        ("tea.py::late", "function"),
        ("tea.py::late~2", "function"),
    ]
    assert [one.title for one in documents[:3]] == ["pkg.tea", "pkg.tea.Tea", "pkg.tea.Tea.hot"]
    assert [one.text for one in documents] == [
        "About the module.\n\n    Indented more.".replace("    I", "I"),
        "class Tea(Drink[int], metaclass=Meta)\n\nA cup.",
        "def hot(self) -> bool\n\nIs it hot?",
        "def hot(self, value: bool) -> None\n\nMake it hot.",
        "async def brew(self, *, minutes: float=3.5, **rest) -> 'Tea'\n\nWait.",
        "def inner()\n\nDeep down.",
        "def late(a, b=(1, 2), /)\n\nOne line.",
        "def late()\n\nAnother.",
    ]
    lines = SOURCE.splitlines()
    assert all("def " in lines[int(one.attributes["line"]) - 1] for one in documents[2:])


def test_the_package_itself_is_named_after_its_folder(tmp_path: Path) -> None:
    write(tmp_path, "outer/__init__.py", "")
    (document,), _ = read(write(tmp_path, "outer/pkg/__init__.py", "'''Doc.'''"))
    assert document.title == "outer.pkg"


def test_a_source_without_docstrings_is_no_error(tmp_path: Path) -> None:
    assert read(write(tmp_path, "a.py", "x = 1\ndef f(): return 'no docstring'.upper()\n''' not first '''")) == ([], [])


def test_declared_encodings_hold(tmp_path: Path) -> None:
    (document,), _ = read(write(tmp_path, "a.py", "# -*- coding: latin-1 -*-\n'''naïve'''".encode("latin-1")))
    assert document.text == "naïve"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(:\n  'x'", r"no valid Python: .*line 1"),
        ("print 'x'", "no valid Python"),
        ("'''open", "no valid Python"),
        (b"'''caf\xe9'''", "no valid Python"),
        ("(" * 5000 + ")" * 5000, "no valid Python"),
        ("x = " + "-" * 100_000 + "1", "no valid Python"),
    ],
)
def test_what_is_no_python_is_refused(tmp_path: Path, source: str | bytes, message: str) -> None:
    with pytest.raises(ReadError, match=message):
        list(read_documents(write(tmp_path, "a.py", source)))


def test_the_standard_library_reads_well() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    documents: dict[str, Document] = {}
    total = 0
    for name in ("json", "email", "collections", "asyncio", "logging", "unittest"):
        for stamp in scan(root / name, exclude=["test", "tests"]).files:
            found, problems = read(stamp)
            assert problems == []
            total += len(found)
            documents.update((str(one.title), one) for one in found)
    assert total > 900
    dumps = documents["json.dumps"]
    assert dumps.text.startswith("def dumps(obj, *, skipkeys=False")
    assert "JSON formatted ``str``" in dumps.text
    assert documents["json.decoder.JSONDecoder.decode"].attributes["object"] == "method"
    module, _ = read(stamp_of(root / "textwrap.py"))
    assert module[0].text == str(sys.modules.get("textwrap", __import__("textwrap")).__doc__).strip()
