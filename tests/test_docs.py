"""The documentation's Python runs, and prints what it says it prints; its benchmark tables are those of the files.

Every ``python`` block of README.md and docs/*.md runs, page by page in one namespace, in an empty folder. A block
after a comment ``<!-- not run -->`` (or ``<!-- not run: why -->``) does not. A ``text`` block right after a block that
runs is what that block prints.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs").glob("*/index.md"))]
BLOCK = re.compile(
    r"(?P<skip><!-- not run[^>]*-->\n+)?^```python\n(?P<code>.*?)^```$(?:\n```text\n(?P<output>.*?)^```$)?", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A block of Python that runs: its code, the line it begins on, and what it is said to print."""

    code: str
    line: int
    output: str | None


def blocks(text: str) -> list[Block]:
    return [
        Block(found["code"], text[: found.start("code")].count("\n") + 1, found["output"])
        for found in BLOCK.finditer(text)
        if not found["skip"]
    ]


RUNNABLE = [page for page in PAGES if blocks(page.read_text(encoding="utf-8"))]


def test_the_convention_is_read_as_it_is_told() -> None:
    page = "a\n```python\nprint(1)\n```\n```text\n1\n```\n<!-- not run: long -->\n```python\nprint(2)\n```\n"
    assert blocks(page) == [Block("print(1)\n", 3, "1\n")]
    assert {page.name for page in RUNNABLE} >= {"README.md", "index.md", "models.md", "encode.md", "indexing.md"}


@pytest.mark.real_model
@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_examples_run_and_print_what_they_say(
    page: Path, minilm_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        printed = io.StringIO()
        # Lines of the page, so that a traceback points there.
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.output is not None:
            assert lines(printed.getvalue()) == lines(block.output), f"{page.name}, line {block.line}"


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def test_benchmark_tables_are_those_of_the_results() -> None:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    page = figures.PAGE.read_text(encoding="utf-8")
    assert figures.filled(page) == page, "run: python benchmarks/figures.py"
