"""JSON and JSON lines: a document a record; what records of all formats have in common."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import TextIOWrapper
from typing import IO, Any

from polyhead.errors import ReadError
from polyhead.search.ingest.document import Document, FileStamp, ProblemLog, Scalar, one_line
from polyhead.search.ingest.encoding import TRUNCATED, Encoding, decode, detect, open_file, read_bytes, say

__all__ = ["OTHER_TEXT_FIELDS", "Record", "RecordReader", "read_json", "read_jsonl", "until_damage"]

Record = dict[str, Any]

OTHER_TEXT_FIELDS = ("body", "content", "contents", "abstract", "description", "summary")
_INTEGER = re.compile(r"-?(?:0|[1-9]\d{0,17})")
_FRACTION = re.compile(r"-?(?:0|[1-9]\d*)\.\d+(?:[eE][-+]?\d+)?")
_LONGEST_LIST = 32  # a list of scalars up to this long becomes an attribute, joined with commas


class RecordReader:
    """Turns records into documents, keeps ids unique, and tells what it could not use.

    A record's text is its ``text_field``; its title the field ``title``; its id ``id`` or ``_id``. Field names are
    matched exactly first, then in any case. All other scalars become attributes, those of nested objects under dotted
    names, short lists of scalars joined with commas; empty values, longer lists and lists of objects do not.
    ``numerals``: attributes that are written as numbers (without leading zeros) become numbers, for formats without
    types.
    """

    def __init__(self, stamp: FileStamp, text_field: str, log: ProblemLog, *, numerals: bool = False) -> None:
        self._stamp = stamp
        self._text_field = text_field
        self._log = log
        self._numerals = numerals
        self._ids: set[str] = set()
        self._read = 0

    def document(self, record: Any, number: int, *, line: int | None = None) -> Document | None:
        """The document of the ``number``-th record (from 1), or None after telling the log why not."""
        if isinstance(record, str):
            record = {self._text_field: record}
        if not isinstance(record, dict):
            self.lost(f"record {number} is {_kind_of(record)}, expected an object with fields", line)
            return None
        field = self._text_of(record)
        if field is None:
            found = ", ".join(map(repr, list(record)[:20])) or "none"
            self.lost(f"no text field {self._text_field!r}; fields found: {found}. Name one with text_field", line)
            return None
        text = _as_text(record[field])
        if text is None:
            self.lost(f"field {field!r} is {_kind_of(record[field])}, expected text", line)
            return None
        title_field = _find(record, "title")
        title = one_line(_as_text(record[title_field]) or "") if title_field is not None else ""
        text = text if text.strip() else title
        if not text.strip():
            self.lost(f"field {field!r} is empty", line)
            return None
        self._read += 1
        used = {field, title_field}
        attributes = dict(_scalars({name: value for name, value in record.items() if name not in used}))
        if self._numerals:
            attributes = {name: _number(value) for name, value in attributes.items()}
        return Document(
            self._id(record, number, line), text, self._stamp.path, title or None, self._stamp.kind, attributes
        )

    def lost(self, reason: str, line: int | None) -> None:
        self._log.lost(reason, line)
        if not self._read and self._log.losses >= ProblemLog.GIVE_UP_AFTER:
            raise self._log.give_up("records read so far")

    def finish(self) -> None:
        """Raise if records were there and none could be read."""
        if not self._read and self._log.losses:
            raise self._log.give_up("records")

    def _text_of(self, record: Record) -> str | None:
        field = _find(record, self._text_field)
        if field is not None or self._text_field != "text":
            return field
        for name in (*OTHER_TEXT_FIELDS, "title"):
            field = _find(record, name)
            if field is not None and _as_text(record[field]):
                return field
        return None

    def _id(self, record: Record, number: int, line: int | None) -> str:
        for name in ("id", "_id"):
            value = record.get(name)
            if isinstance(value, str | int) and str(value).strip():
                break
        else:
            return f"{self._stamp.path}#{number}"
        wanted = unique = str(value).strip()
        copy = 1
        while unique in self._ids:
            copy += 1
            unique = f"{wanted}~{copy}"
        if unique != wanted:
            self._log.caveat(f"the id {wanted!r} was used before in this file: kept as {unique!r}", line)
        self._ids.add(unique)
        return f"{self._stamp.path}::{unique}"


def read_json(stamp: FileStamp, text_field: str, log: ProblemLog) -> Iterator[Document]:
    """One document for each object of a list; a single object is a single record."""
    source, _ = decode(read_bytes(stamp), stamp.path, log)
    if not source.strip():
        return
    try:
        content = json.loads(source)
    except ValueError as error:
        hint = "; is it JSON lines? Then name it .jsonl" if "Extra data" in str(error) else ""
        raise ReadError(stamp.path, f"no valid JSON: {error}{hint}") from None
    except RecursionError:
        raise ReadError(stamp.path, "JSON nested too deeply to parse") from None
    reader = RecordReader(stamp, text_field, log)
    for number, record in enumerate(content if isinstance(content, list) else [content], 1):
        document = reader.document(record, number)
        if document is not None:
            yield document
    reader.finish()


def read_jsonl(stamp: FileStamp, text_field: str, log: ProblemLog) -> Iterator[Document]:
    """One document a line, read as a stream; a damaged line is told with its number and the rest goes on."""
    reader = RecordReader(stamp, text_field, log)
    for number, line in _lines(stamp, log):
        try:
            source = line if isinstance(line, str) else line.decode("utf-8")
            if not source.strip():
                continue
            record = json.loads(source)
        except UnicodeDecodeError as error:
            reader.lost(f"no valid UTF-8 at byte {error.start + 1} of the line", number)
            continue
        except (ValueError, RecursionError) as error:
            reader.lost(f"no valid JSON: {_reason(error)}", number)
            continue
        document = reader.document(record, number, line=number)
        if document is not None:
            yield document
    reader.finish()


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):  # its own line and column count the line end at which it noticed
        return f"{error.msg} at character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _lines(stamp: FileStamp, log: ProblemLog) -> Iterator[tuple[int, str | bytes]]:
    """Numbered lines: bytes where the file is UTF-8, so that one bad line harms no other; else text."""
    with open_file(stamp) as stream:
        encoding = detect(stream, stamp.path)
    with open_file(stamp) as stream:
        yield from until_damage(enumerate(_open_lines(stream, encoding, log), 1), log)


def _open_lines(stream: IO[bytes], encoding: Encoding, log: ProblemLog) -> Iterator[str | bytes]:
    if encoding.name == "utf-8":
        yield from stream
        return
    if encoding.guessed:
        say(encoding, "", log)
    yield from TextIOWrapper(stream, encoding.name, "replace", newline="\n")


def until_damage(numbered: Iterator[tuple[int, Any]], log: ProblemLog) -> Iterator[tuple[int, Any]]:
    """The lines or rows up to the place where gzipped data breaks off, which is told."""
    last = 0
    try:
        for last, one in numbered:
            yield last, one
    except TRUNCATED as error:
        log.lost(f"gzip data is damaged from here on: {error}", last + 1)


def _find(record: Record, name: str) -> str | None:
    if name in record:
        return name
    return next((field for field in record if isinstance(field, str) and field.lower() == name.lower()), None)


def _as_text(value: Any) -> str | None:
    """Text of a field: a string, a number, or a list of strings (its paragraphs). ``null`` is empty."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return "\n\n".join(value)
    return None


def _scalars(record: Record, prefix: str = "", depth: int = 8) -> Iterator[tuple[str, Scalar]]:
    for name, value in record.items():
        if isinstance(value, str | int | float | bool):
            if value == "":
                continue
            yield prefix + str(name), value
        elif isinstance(value, dict) and depth:
            yield from _scalars(value, f"{prefix}{name}.", depth - 1)
        elif isinstance(value, list) and _is_short_list(value):
            yield prefix + str(name), ", ".join(map(str, value))


def _is_short_list(value: list[Any]) -> bool:
    return 0 < len(value) <= _LONGEST_LIST and all(isinstance(one, str | int | float) for one in value)


def _number(value: Scalar) -> Scalar:
    if isinstance(value, str):
        if _INTEGER.fullmatch(value):
            return int(value)
        if _FRACTION.fullmatch(value):
            return float(value)
    return value


def _kind_of(value: Any) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a text"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")
