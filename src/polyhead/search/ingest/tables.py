"""CSV and TSV: a document a row."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO, TextIOWrapper
from typing import Any, Literal

from polyhead.errors import ReadError
from polyhead.search.ingest.document import Document, FileStamp, ProblemLog
from polyhead.search.ingest.encoding import TRUNCATED, detect, open_file, say
from polyhead.search.ingest.records import OTHER_TEXT_FIELDS, RecordReader, until_damage

__all__ = ["read_csv", "read_tsv"]

_SAMPLE = 1 << 16  # characters looked at to find the delimiter
_MANY_LINES = 500  # a row longer than this probably has a quote that is never closed
_LONGEST_FIELD = 1 << 30  # characters; the standard library's limit of 131,072 is shorter than a book's chapter


@dataclass(frozen=True)
class _Dialect:
    delimiter: str
    quoting: Literal[0, 3]  # csv.QUOTE_MINIMAL, csv.QUOTE_NONE

    def rows(self, lines: Any) -> Any:
        return csv.reader(lines, delimiter=self.delimiter, quoting=self.quoting)


_QUOTED = [_Dialect(delimiter, 0) for delimiter in (",", ";", "\t", "|")]
_TAB_RAW = _Dialect("\t", 3)  # many .tsv files hold quotes that mean nothing


def read_csv(stamp: FileStamp, text_field: str, log: ProblemLog) -> Iterator[Document]:
    """One document a row; the first row names the columns, the delimiter is found from , ; tab and |.

    Numbers without leading zeros become numeric attributes. A row with more or fewer fields than columns is told.
    """
    return _read(stamp, text_field, log, [*_QUOTED, _TAB_RAW])


def read_tsv(stamp: FileStamp, text_field: str, log: ProblemLog) -> Iterator[Document]:
    """As ``read_csv``, with tabs; quotes count as such only where the columns come out even with them."""
    return _read(stamp, text_field, log, [_QUOTED[2], _TAB_RAW])


def _read(stamp: FileStamp, text_field: str, log: ProblemLog, dialects: list[_Dialect]) -> Iterator[Document]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    with open_file(stamp) as stream:
        encoding = detect(stream, stamp.path)
    if encoding.guessed:
        say(encoding, "", log)
    with open_file(stamp) as stream:
        dialect = _best(_sample(TextIOWrapper(stream, encoding.name, "replace", newline="")), dialects)
    with open_file(stamp) as stream:
        table = dialect.rows(TextIOWrapper(stream, encoding.name, "replace", newline=""))
        numbered = until_damage(_numbered(table, stamp), log)
        header: list[str] = next((row for _, row in numbered if any(name.strip() for name in row)), [])
        if not header:
            return
        columns = _columns(header)
        if not _has_text(columns, text_field):
            raise ReadError(
                stamp.path,
                f"no column {text_field!r}; the first line must name the columns and holds "
                f"{', '.join(repr(name[:40]) for name in header[:20])}. Add such a line, or name a column with "
                "text_field",
            )
        yield from _documents(numbered, columns, RecordReader(stamp, text_field, log, numerals=True), log)


def _documents(
    numbered: Iterator[tuple[int, list[str]]], columns: list[str], reader: RecordReader, log: ProblemLog
) -> Iterator[Document]:
    number = 0
    for line, row in numbered:
        if not any(field.strip() for field in row):
            continue
        number += 1
        if len(row) != len(columns):
            reader.lost(f"row {number} has {len(row)} fields, the header names {len(columns)}", line)
            continue
        lines = sum(field.count("\n") for field in row)
        if lines > _MANY_LINES:
            log.caveat(f"row {number} spans {lines:,} lines: is a quote left open?", line)
        if any("\ufffd" in field for field in row):
            log.caveat(f"row {number} has bytes that are not valid in the file's encoding: shown as \ufffd", line)
        document = reader.document(dict(zip(columns, row, strict=True)), number, line=line)
        if document is not None:
            yield document
    reader.finish()


def _numbered(table: Any, stamp: FileStamp) -> Iterator[tuple[int, list[str]]]:
    """Rows with the line on which they begin."""
    while True:
        line = table.line_num + 1
        try:
            row = next(table)
        except StopIteration:
            return
        except csv.Error as error:
            raise ReadError(stamp.path, f"line {line}: no valid table: {error}") from None
        yield line, row


def _sample(stream: TextIOWrapper) -> str:
    lines: list[str] = []
    size = 0
    try:
        for line in stream:
            lines.append(line)
            size += len(line)
            if size >= _SAMPLE:
                break
    except TRUNCATED:
        pass  # told when the rows are read
    return "".join(lines)


def _best(sample: str, dialects: list[_Dialect]) -> _Dialect:
    """The dialect under which most rows are as wide as the first; then the widest; then the first of the list."""

    def evenness(dialect: _Dialect) -> tuple[bool, float, int]:
        rows = _rows_of(sample, dialect)
        width = len(rows[0]) if rows else 0
        return width > 1, sum(len(row) == width for row in rows) / max(1, len(rows)), width

    best = max(dialects, key=evenness)
    if best.delimiter == "\t" and evenness(_TAB_RAW)[1] == 1.0:
        # Even without quoting: quotes still count if every field that opens one closes it.
        fields = [field for row in _rows_of(sample, _TAB_RAW) for field in row if field.startswith('"')]
        return best if all(len(field) > 1 and field.endswith('"') for field in fields) else _TAB_RAW
    return best


def _rows_of(sample: str, dialect: _Dialect) -> list[list[str]]:
    try:
        return [row for row in dialect.rows(StringIO(sample, newline="")) if row]
    except csv.Error:
        return []


def _columns(header: list[str]) -> list[str]:
    """Names of all columns: nameless ones get ``column3``, repeated ones ``name.2``."""
    names: list[str] = []
    for position, name in enumerate(header, 1):
        wanted = unique = name.strip() or f"column{position}"
        copy = 1
        while unique in names:
            copy += 1
            unique = f"{wanted}.{copy}"
        names.append(unique)
    return names


def _has_text(columns: list[str], text_field: str) -> bool:
    known = {name.lower() for name in columns}
    return text_field.lower() in known or (text_field == "text" and not known.isdisjoint((*OTHER_TEXT_FIELDS, "title")))
