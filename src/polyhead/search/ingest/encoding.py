"""Bytes to text: UTF-8 first, a byte order mark before that, and a guess (said aloud) for the rest."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, cast

from polyhead.errors import ReadError
from polyhead.search.ingest.document import FileStamp, ProblemLog

__all__ = ["Encoding", "decode", "detect", "open_file", "read_bytes", "read_text"]

TRUNCATED = (EOFError, zlib.error)  # what gzip raises in the middle of a damaged file

_MARKS = (  # UTF-32's little-endian mark begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_MAINFRAME = ["cp037", "cp273", "cp424", "cp500", "cp875", "cp1026", "cp1140"]  # EBCDIC: guessed for short texts
_SAMPLE = 1 << 18  # bytes of lines that are no UTF-8, for the guess


@dataclass(frozen=True)
class Encoding:
    """A codec name, how sure (``guessed``), and whether some bytes do not fit it (``damaged``)."""

    name: str
    guessed: bool = False
    damaged: bool = False


def open_file(stamp: FileStamp) -> IO[bytes]:
    """The bytes of a file, unpacked where it is gzipped."""
    return cast(
        IO[bytes], gzip.open(stamp.absolute) if stamp.absolute.lower().endswith(".gz") else open(stamp.absolute, "rb")
    )


def read_bytes(stamp: FileStamp) -> bytes:
    with open_file(stamp) as stream:
        return stream.read()


def read_text(stamp: FileStamp, log: ProblemLog) -> tuple[str, Encoding]:
    """The whole file as text with ``\\n`` line ends; caveats (guessed encoding, damaged bytes) go to the log."""
    return decode(read_bytes(stamp), stamp.path, log)


def decode(data: bytes, path: str, log: ProblemLog) -> tuple[str, Encoding]:
    encoding = detect(data.splitlines(keepends=True), path)
    text = data.decode(encoding.name, "replace")
    say(encoding, text, log)
    return text.replace("\r\n", "\n").replace("\r", "\n"), encoding


def say(encoding: Encoding, text: str, log: ProblemLog) -> None:
    if encoding.guessed:
        log.caveat(f"not UTF-8: read as {encoding.name}, which is a guess; convert the file if letters look wrong")
    elif encoding.damaged or "\ufffd" in text:
        count = text.count("\ufffd")
        log.caveat(f"{count} place{'s'[: count != 1]} not valid {encoding.name}: shown as \ufffd")


def detect(lines: Iterator[bytes] | list[bytes], path: str) -> Encoding:
    """The encoding of a file given as its lines; reads to the end, keeps little.

    Bytes that are valid UTF-8 sequences outnumber the invalid ones in a UTF-8 file with damage, and are rare
    accidents in any other encoding.

    Raises:
        ReadError: NUL bytes, so binary data.
    """
    valid = invalid = 0
    sample = b""
    try:
        for number, line in enumerate(lines):
            if number == 0 and (found := _first_bytes(line)) is not None:
                return found
            if b"\0" in line:
                raise ReadError(path, "binary data (it holds NUL bytes), not text: is the suffix right?")
            if line.isascii():
                continue
            try:  # the usual case, and fast
                valid += len(line) - len(line.decode("utf-8"))
                continue
            except UnicodeDecodeError:
                text = line.decode("utf-8", "surrogateescape")
            bad = sum(1 for character in text if "\udc80" <= character <= "\udcff")
            invalid += bad
            valid += sum(1 for character in text if character >= "\x80") - bad
            if bad and len(sample) < _SAMPLE:
                sample += line[:_SAMPLE]
    except TRUNCATED:
        pass  # the reader meets it again and says where
    if not invalid:
        return Encoding("utf-8")
    return Encoding("utf-8", damaged=True) if valid > invalid else Encoding(_guess(sample), guessed=True)


def _first_bytes(line: bytes) -> Encoding | None:
    for mark, name in _MARKS:
        if line.startswith(mark):
            return Encoding(name)
    head = line[:4096]
    even, odd = head[::2].count(0), head[1::2].count(0)
    if len(head) >= 4 and max(even, odd) > 0.4 * len(head) / 2 and min(even, odd) == 0:
        return Encoding("utf-16-le" if odd else "utf-16-be")
    return None


def _guess(sample: bytes) -> str:
    """charset-normalizer's guess, except where the bytes read well as Western European, which it rarely sees in
    short texts."""
    try:
        western = sample.decode("cp1252")
    except UnicodeDecodeError:
        western = ""
    if western and _reads_well(western):
        return "cp1252"
    from charset_normalizer import from_bytes

    best = from_bytes(sample, cp_exclusion=_MAINFRAME).best()
    return best.encoding if best is not None else "latin-1"


def _reads_well(text: str) -> bool:
    letters = accented = 0
    for before, character, after in zip(" " + text, text, text[1:] + " ", strict=False):
        if character.isalpha():
            letters += 1
            accented += character >= "\x80"
        elif character >= "\x80" and character not in "’‘´·ªº" and before.isalpha() and after.isalpha():
            return False  # a sign such as ³ or ¹ inside a word is a letter of another code page
    return accented <= 0.3 * letters
