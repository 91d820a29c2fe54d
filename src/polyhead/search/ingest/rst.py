"""reStructuredText to readable text: titles, lists, directives and roles, by their shapes.

docutils would refuse the directives and roles of Sphinx, which most .rst files use, and would run the others; for
reading it is enough to know what markup looks like.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

from polyhead.search.ingest.document import Document, FileStamp, ProblemLog, TextBuilder
from polyhead.search.ingest.encoding import read_text
from polyhead.search.ingest.plain import encoding_attributes, file_title

__all__ = ["read_rst"]

_ADORNMENT = re.compile(r"([!-/:-@\[-`{-~])\1+\s*$")
_DIRECTIVE = re.compile(r"\s*\.\.\s+(?:\|[^|]+\|\s+)?([\w:.+-]+?)::(?:\s+(.*))?$")
_FOOTNOTE = re.compile(r"\s*\.\.\s+(\[[^\]]+\]\s+\S.*)$")
_EXPLICIT = re.compile(r"\s*(?:\.\.|__)(?:\s|$)")  # a comment or a link target
_OPTION = re.compile(r"\s*:[\w -]+:(?:\s|$)")
_FIELD = re.compile(r"\s*:([A-Za-z][^:`]*):\s+(?=\S)")
_FLAG = re.compile(r"\s*:([\w -]+):\s*$")
_FILE_FLAGS = {"orphan", "nocomments", "nosearch"}
_BULLET = re.compile(r"\s*(?:[*+•-]|#\.|\(?\d{1,3}[.)])\s+(?=\S)")
_TABLE_RULE = re.compile(r"\s*(?:\+[-=+]{3,}|={2,}(?:\s+={2,})+)\s*$")

# Directives whose content is no text, those whose content is shown as it stands, and those whose argument is no text.
_MECHANICAL = {"toctree", "contents", "index", "highlight", "include", "literalinclude", "image", "raw", "meta"}
_MECHANICAL |= {"only", "ifconfig", "tabularcolumns", "default-role", "role", "module", "currentmodule", "py:module"}
_MECHANICAL |= {"py:currentmodule", "autofunction", "autoclass", "automodule", "automethod", "autosummary"}
_MECHANICAL |= {"sectionauthor", "moduleauthor", "testsetup", "testcleanup"}
_VERBATIM = {"code-block", "code", "sourcecode", "parsed-literal", "doctest", "testcode", "testoutput", "math"}
_VERBATIM |= {"productionlist"}
_SILENT_ARGUMENT = _VERBATIM | {"figure", "list-table", "csv-table", "class", "container"}

_ROLE = re.compile(r"(?<!\w):[\w:+.-]+:`([^`]+)`")
_INLINE = (
    (re.compile(r"``(.+?)``", re.DOTALL), r"\1"),
    (re.compile(r"`([^`<>]+?)\s*<[^`<>]*>`__?"), r"\1"),
    (re.compile(r"`([^`]+)`(?:__?(?!\w))?"), r"\1"),
    (re.compile(r"(?<![\w*])\*\*(?=\S)([^*]+)(?<=\S)\*\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<![\w*])\*(?=\S)([^*]+)(?<=\S)\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<![\w|])\|(?=\S)([^|\n]+)(?<=\S)\|(?:__?)?(?![\w|])"), r"\1"),
    (re.compile(r"\\(\W)"), r"\1"),
)


def read_rst(stamp: FileStamp, text_field: str, log: ProblemLog) -> Iterator[Document]:
    """One document. Title: the first section title, else the file's name."""
    source, encoding = read_text(stamp, log)
    builder = TextBuilder()
    _Converter(source.expandtabs(8).split("\n"), builder).run()
    if builder.text:
        title = builder.headings[0][1] if builder.headings else file_title(stamp)
        attributes = encoding_attributes(encoding)
        yield Document(stamp.path, builder.text, stamp.path, title, stamp.kind, attributes, builder.headings)


class _Converter:
    """Walks the lines once; ``_paragraph`` holds the lines of the block that is being read."""

    def __init__(self, lines: list[str], builder: TextBuilder) -> None:
        self._lines = lines
        self._at = 0
        self._builder = builder
        self._paragraph: list[str] = []
        self._item = False  # the paragraph is a list item
        self._tight = False  # it stands on the line after the last
        self._in_table = False

    def run(self) -> None:
        while self._at < len(self._lines):
            line = self._lines[self._at]
            if not line.strip():
                self._flush()
                self._at += 1
            elif not self._paragraph and self._title(line):
                pass
            elif found := _DIRECTIVE.match(line):
                self._flush()
                self._directive(found[1].lower(), found[2] or "", _indent(line))
            elif found := _FOOTNOTE.match(line):
                self._flush()
                self._paragraph = [found[1]]
                self._at += 1
            elif _EXPLICIT.match(line):
                self._flush()
                self._body(_indent(line))
            else:
                self._text(line)
        self._flush()

    def _title(self, line: str) -> bool:
        """Take a section title or a rule at this line, if there is one."""
        below = self._lines[self._at + 1] if self._at + 1 < len(self._lines) else ""
        if _ADORNMENT.match(line):
            under = self._lines[self._at + 2] if self._at + 2 < len(self._lines) else ""
            if below.strip() and under.rstrip() == line.rstrip():
                self._heading(below)
                self._at += 3
                return True
            if not below.strip() and len(line.strip()) >= 4:
                self._at += 1
                return True
            return False
        if not line[0].isspace() and _ADORNMENT.match(below) and len(below.rstrip()) >= min(4, len(line.rstrip())):
            self._heading(line)
            self._at += 2
            return True
        return False

    def _heading(self, line: str) -> None:
        self._builder.heading(_plain(line.strip()))

    def _directive(self, name: str, argument: str, indent: int) -> None:
        if name in _MECHANICAL:
            self._body(indent)
            return
        if name in _VERBATIM:
            body = self._body(indent)
            while body and (not body[0].strip() or _OPTION.match(body[0])):
                body.pop(0)
            self._builder.block(textwrap.dedent("\n".join(body)))
            return
        self._at += 1
        if argument and name not in _SILENT_ARGUMENT:
            self._paragraph = [argument]
        while self._at < len(self._lines) and _OPTION.match(self._lines[self._at]):
            self._at += 1

    def _body(self, indent: int) -> list[str]:
        """Pass this line and the deeper ones below it; returns the deeper ones."""
        self._at += 1
        start = self._at
        while self._at < len(self._lines):
            line = self._lines[self._at]
            if line.strip() and _indent(line) <= indent:
                break
            self._at += 1
        return self._lines[start : self._at]

    def _text(self, line: str) -> None:
        self._at += 1
        if _TABLE_RULE.match(line):
            self._flush()
            self._in_table = self._at < len(self._lines) and bool(self._lines[self._at].strip())
            return
        if flag := _FLAG.match(line):
            self._flush()
            self._builder.block("" if flag[1] in _FILE_FLAGS else f"{flag[1]}:", tight=True)
            return
        if self._in_table or line.lstrip().startswith("|"):  # or a line block
            self._flush()
            self._builder.block(_row(line), tight=True)
            return
        if bullet := _BULLET.match(line):
            self._flush()
            self._item = True
            line = line[bullet.end() :]
        elif field := _FIELD.match(line):
            self._flush()
            self._tight = True
            line = f"{field[1]}: {line[field.end() :]}"
        indent = _indent(line)
        self._paragraph.append(line)
        if line.rstrip().endswith("::"):
            self._paragraph[-1] = line.rstrip()[:-1] if line.strip() != "::" else ""
            following = next((one for one in self._lines[self._at :] if one.strip()), "")
            blank_follows = self._at >= len(self._lines) or not self._lines[self._at].strip()
            if blank_follows and _indent(following) > indent:
                self._flush()
                self._at -= 1
                self._builder.block(textwrap.dedent("\n".join(self._body(indent))))

    def _flush(self) -> None:
        lines, self._paragraph = self._paragraph, []
        item, self._item = self._item, False
        tight, self._tight = self._tight or item, False
        if not lines:
            return
        if lines[0].lstrip().startswith(">>>"):
            self._builder.block(textwrap.dedent("\n".join(lines)))
            return
        text = _plain(" ".join(line.strip() for line in lines if line.strip()))
        self._builder.block(("- " if item else "") + text if text else "", tight=tight)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _row(line: str) -> str:
    """A row of a table or a line of a line block, with its cells apart."""
    cells = line.strip().strip("|").split("|") if "|" in line else re.split(r"\s{2,}", line.strip())
    return _plain(" | ".join(cell.strip() for cell in cells))


def _role(found: re.Match[str]) -> str:
    content = found[1]
    target = re.fullmatch(r"([^<]+?)\s*<[^>]*>", content, re.DOTALL)
    if target:
        return target[1]
    return content[1:].rsplit(".", 1)[-1] if content.startswith("~") else content.lstrip("!")


def _plain(text: str) -> str:
    text = _ROLE.sub(_role, text)
    for pattern, plain in _INLINE:
        text = pattern.sub(plain, text)
    return text
