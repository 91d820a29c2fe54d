"""What ingest hands on: documents, the stamps of the files they came from, and what went wrong on the way."""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field

from polyhead.errors import ReadError

__all__ = ["Document", "FileStamp", "ProblemLog", "ReadProblem", "Scalar", "TextBuilder", "clean", "one_line"]

Scalar = str | int | float | bool


@dataclass(frozen=True)
class FileStamp:
    """A file as the scan saw it: enough to tell whether it changed, without opening it.

    ``path`` is relative to the scanned folder, with ``/``, and always valid Unicode: bytes of a file name that are
    no UTF-8 appear as ``\\xhh``. ``absolute`` opens the file. ``size`` is in bytes, ``mtime_ns`` in nanoseconds since
    1970 (UTC).
    """

    path: str
    absolute: str
    kind: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Document:
    """One readable thing: a file, a record of a data file, or a documented Python object.

    ``id`` is unique among all files below one scanned folder: the path; ``path::id`` or ``path#number`` for records;
    ``path::qualname`` for Python objects. ``headings`` are ``(offset into text, heading)``, rising by offset.
    """

    id: str
    text: str
    path: str
    title: str | None
    kind: str
    attributes: dict[str, Scalar] = field(default_factory=dict)
    headings: tuple[tuple[int, str], ...] = ()

    def heading_at(self, offset: int) -> str | None:
        """The heading under which the character at ``offset`` stands; None above the first heading."""
        before = bisect_right(self.headings, offset, key=lambda heading: heading[0])
        return self.headings[before - 1][1] if before else None


@dataclass(frozen=True)
class ReadProblem:
    """Something the reader of a file wants told. ``lost``: a record or page could not be read and is missing;
    otherwise it was read, with the caveat in ``reason``. ``line`` counts from 1 where lines make sense."""

    path: str
    reason: str
    line: int | None = None
    lost: bool = True

    def __str__(self) -> str:
        return f"{self.path}{'' if self.line is None else f', line {self.line}'}: {self.reason}"


class ProblemLog:
    """Collects the problems of one file; without a list to fill, the first loss is an error."""

    GIVE_UP_AFTER = 1000  # losses before the first success: the whole file is unlike what was expected

    def __init__(self, path: str, problems: list[ReadProblem] | None) -> None:
        self.path = path
        self.first: ReadProblem | None = None
        self.losses = 0
        self._problems = problems

    def lost(self, reason: str, line: int | None = None) -> None:
        problem = ReadProblem(self.path, reason, line)
        self.first = self.first or problem
        self.losses += 1
        if self._problems is None:
            raise ReadError(self.path, reason if line is None else f"line {line}: {reason}")
        self._problems.append(problem)

    def caveat(self, reason: str, line: int | None = None) -> None:
        if self._problems is not None:
            self._problems.append(ReadProblem(self.path, reason, line, lost=False))

    def give_up(self, what: str) -> ReadError:
        """The error for a file of which nothing could be read; its single losses are withdrawn, the error says it."""
        first, count = self.first, self.losses
        assert first is not None
        if self._problems is not None:
            self._problems[:] = [one for one in self._problems if not (one.lost and one.path == self.path)]
        where = "" if first.line is None else f"line {first.line}: "
        summary = f"none of {count:,} {what} could be read; the first: " if count > 1 else ""
        return ReadError(self.path, f"{summary}{where}{first.reason}")


_SURROGATES = re.compile("[\ud800-\udfff]")
_BLANK_RUN = re.compile(r"\s+")


def clean(text: str) -> str:
    """``text`` without what no store or tokenizer takes: lone surrogates become U+FFFD, so that offsets hold."""
    return text if text.isascii() else _SURROGATES.sub("\ufffd", text)


def one_line(text: str) -> str:
    """``text`` with every run of blanks as one space."""
    return _BLANK_RUN.sub(" ", text).strip()


class TextBuilder:
    """Joins blocks into a text and remembers where its headings stand."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0
        self._headings: list[tuple[int, str]] = []

    def block(self, text: str, *, tight: bool = False) -> None:
        """Add a paragraph after an empty line; ``tight``: on the next line (list items, table rows)."""
        text = text.strip("\n").rstrip()
        if not text.strip():
            return
        if self._pieces:
            self._push("\n" if tight else "\n\n")
        self._push(text)

    def heading(self, text: str) -> None:
        text = one_line(text)
        if text:
            self.block(text)
            self._headings.append((self._length - len(text), text))

    def mark(self, text: str) -> None:
        """Note a heading at the place where the next block begins, without adding it to the text."""
        self._headings.append((self.next_offset, text))

    @property
    def next_offset(self) -> int:
        """Where the next block begins, unless it is tight."""
        return self._length + 2 if self._pieces else 0

    def _push(self, piece: str) -> None:
        self._pieces.append(piece)
        self._length += len(piece)

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def headings(self) -> tuple[tuple[int, str], ...]:
        return tuple(heading for heading in self._headings if heading[0] < self._length)
