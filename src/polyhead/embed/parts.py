"""Split a text into parts that can each be embedded: sentences, clauses, overlapping word windows, or the whole.

A question that asks several things at once is poorly served by one vector; its parts are served well
(aspect-based similarity). Every part carries exact character offsets: ``text[part.start:part.end] == part.text``.

What each kind is:

``"whole"``
    The text without the blanks around it.
``"sentence"``
    Sentences as ``sentencex`` sees them (about 240 languages, ``language`` picks the rules), and paragraphs.
``"clause"``
    Sentences split at clause punctuation of any script (``, ; : —`` and their full-width, Arabic and Ethiopic
    forms), at spaced hyphens, before list items, at the spaces of Thai, Lao, Khmer and Burmese (which separate
    phrases, not words), and at coordinating words (``and``, ``oder``, ``mais`` ...) with three words or more on
    both sides. Separators belong to no clause. ``1,000`` and ``12:30`` stay whole.
``"window"``
    ``window`` words, the next window ``stride`` words further on, across sentence borders; the last one is moved
    back so that it is full too, so every word is covered. A word is what stands between blanks; in scripts
    written without blanks, 2 characters of Chinese or Japanese and 4 of Thai, Lao, Khmer, Burmese or Tibetan
    (their usual word lengths) count as one word, and a combining mark is never cut from its letter.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from polyhead.errors import InputError

__all__ = ["PART_KINDS", "Part", "split_parts", "thin_parts"]

PART_KINDS = ("whole", "sentence", "clause", "window")

Span = tuple[int, int]


@dataclass(frozen=True)
class Part:
    """A piece of a text: ``text == source[start:end]`` (offsets in characters, not bytes or tokens)."""

    text: str
    start: int
    end: int
    kind: str


def split_parts(
    text: str,
    kinds: Sequence[str] = ("sentence", "clause", "window"),
    *,
    window: int = 8,
    stride: int | None = None,
    language: str = "en",
    max_parts: int | None = None,
) -> list[Part]:
    """Parts of ``text``, kind by kind in the order of ``kinds``, each kind in reading order.

    No part is blank and no two parts have the same span: where kinds agree (a sentence of a single clause that is
    no longer than a window), the kind named first in ``kinds`` keeps the span. A blank text has no parts.

    Args:
        text: any Unicode text.
        kinds: which of ``PART_KINDS``, in order of precedence.
        window: words a window.
        stride: words from one window to the next, 1 to ``window``; ``window // 2`` where not given.
        language: ISO 639-1 code for the rules of sentences and the coordinating words; other codes fall back to
            related languages or language-neutral rules.
        max_parts: refuse a text with more parts than this (nothing is dropped in silence; see ``thin_parts``).

    Raises:
        InputError: unknown kind, impossible window or stride, or more than ``max_parts`` parts.

    >>> [part.text for part in split_parts("Who founded Rome, and when?", ("clause",))]
    ['Who founded Rome', 'when?']
    """
    step = max(1, window // 2) if stride is None else stride
    _check(kinds, window, step)
    splitters: dict[str, Callable[[], Iterable[Span]]] = {
        "whole": lambda: [(0, len(text))],
        "sentence": lambda: _sentences(text, language),
        "clause": lambda: _clauses(text, language),
        "window": lambda: _windows(text, window, step),
    }
    parts: dict[Span, Part] = {}
    for kind in kinds:
        for span in splitters[kind]():
            start, end = _strip(text, span)
            if start < end and (start, end) not in parts:
                parts[start, end] = Part(text[start:end], start, end, kind)
    if max_parts is not None and len(parts) > max_parts:
        raise InputError(
            f"a text of {len(text):,} characters has {len(parts):,} parts, more than max_parts={max_parts:,}: raise "
            "max_parts, use fewer kinds or a longer stride, or keep an even selection with thin_parts()"
        )
    return list(parts.values())


def thin_parts(parts: Sequence[Part], limit: int) -> tuple[list[Part], int]:
    """At most ``limit`` parts spread evenly over ``parts``, in order, and the number left out (for the caller to say).

    >>> kept, left_out = thin_parts(split_parts("a b c d e f", ("window",), window=1), 3)
    >>> [part.text for part in kept], left_out
    (['a', 'c', 'e'], 3)
    """
    if limit < 1:
        raise InputError(f"limit is {limit}: at least one part must be kept")
    if len(parts) <= limit:
        return list(parts), 0
    return [parts[i * len(parts) // limit] for i in range(limit)], len(parts) - limit


def _check(kinds: Sequence[str], window: int, stride: int) -> None:
    if isinstance(kinds, str) or not kinds or any(kind not in PART_KINDS for kind in kinds):
        raise InputError(f"kinds is {kinds!r}: expected a list of one or more of {', '.join(PART_KINDS)}")
    if window < 1:
        raise InputError(f"window is {window}: a window holds at least 1 word")
    if not 1 <= stride <= window:
        raise InputError(f"stride is {stride}: expected 1 to window={window}, else words would be left out")


def _strip(text: str, span: Span) -> Span:
    start, end = span
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


# --- sentences -------------------------------------------------------------------------------------------------

_SURROGATE = re.compile("[\ud800-\udfff]")


def _sentences(text: str, language: str) -> Iterator[Span]:
    from sentencex import get_sentence_boundaries

    # sentencex is Rust and takes no lone surrogates; the stand-in has the same length, so offsets hold.
    for found in get_sentence_boundaries(language, _SURROGATE.sub("\ufffd", text)):
        yield found["start_index"], found["end_index"]


# --- clauses ---------------------------------------------------------------------------------------------------

# Scripts written without blanks between words. The second group puts blanks between phrases.
_CJK = "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3031-\u3035\u303b-\u30ff\u3100-\u312f\u31f0-\u31ff"
_CJK += "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f\U00020000-\U0003ffff"
_SOUTH_EAST = "\u0e01-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaadf"

_COORDINATING = {
    "en": "and|or|but|nor|whereas|while|versus|vs",
    "de": "und|oder|aber|sowie|sondern|während",
    "fr": "et|ou|mais|ainsi que|tandis que",
    "es": "y|e|o|u|pero|sino|mientras",
    "it": "e|ed|o|oppure|ma|mentre",
    "pt": "e|ou|mas|enquanto",
    "nl": "en|of|maar|terwijl",
    "sv": "och|eller|men|medan",
    "da": "og|eller|men|mens",
    "no": "og|eller|men|mens",
    "pl": "i|oraz|lub|albo|ale",
    "cs": "a|nebo|ale",
    "ru": "и|или|но|а также",
    "uk": "і|й|та|або|але",
    "tr": "ve|veya|ama",
    "el": "και|ή|αλλά",
    "id": "dan|atau|tetapi",
    "hi": "और|या|लेकिन",
    "ar": "أو|ثم|لكن",
}
_LEAST_WORDS = 3  # on both sides of a coordinating word: "salt and pepper" is one thing


@lru_cache(maxsize=64)
def _separators(language: str) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
    """Pattern of what always separates clauses, and pattern of the coordinating words (separators if far apart)."""
    words = _COORDINATING.get(language.lower().split("-")[0].split("_")[0])
    then_word = rf"(?:\s*(?:{words})(?=\s))?" if words else ""
    punctuation = (
        r"[,;:،؛፣፤፥][\"'”’»)\]]*(?=\s|$)"  # inside 1,000, 12:30 and http://x no blank follows
        r"|(?<!\d)[，；：、､︐︑︓︔]+|[，；：、､︐︑︓︔]+(?!\d)"  # no blank follows these; 10：30 stays whole
        r"|(?<!\s)\s*[—―⸺]+\s*|(?<=\S)\s+(?:--?-?|–)\s+|(?<=\w)--(?=\w)"  # lookbehinds keep long blanks linear
        r"|\n[^\S\n]*(?:[-*•‣◦]|\d{1,3}[.)])\s+"  # a list item
    )
    phrase_blank = rf"(?<=[{_SOUTH_EAST}])\s+(?=[{_SOUTH_EAST}])"
    always = re.compile(rf"(?:{punctuation}){then_word}|{phrase_blank}", re.IGNORECASE)
    return always, re.compile(rf"(?<=\s)(?:{words})(?=\s)", re.IGNORECASE) if words else None


def _clauses(text: str, language: str) -> Iterator[Span]:
    always, coordinating = _separators(language)
    for start, end in _sentences(text, language):
        if not text[start:end].strip():
            continue
        pieces = list(_between(start, end, ((m.start(), m.end()) for m in always.finditer(text, start, end))))
        if coordinating is not None:
            pieces = [part for piece in pieces for part in _split_at_words(text, piece, coordinating)]
        yield from pieces if len(pieces) > 1 else [(start, end)]


def _between(start: int, end: int, cuts: Iterable[Span]) -> Iterator[Span]:
    for cut_start, cut_end in cuts:
        if start < cut_start:
            yield start, cut_start
        start = cut_end
    if start < end:
        yield start, end


def _split_at_words(text: str, piece: Span, coordinating: re.Pattern[str]) -> Iterator[Span]:
    start, end = piece
    for found in coordinating.finditer(text, start, end):
        left, right = text[start : found.start()], text[found.end() : end]
        if len(left.split(None, _LEAST_WORDS)) >= _LEAST_WORDS and len(right.split(None, _LEAST_WORDS)) >= _LEAST_WORDS:
            yield start, found.start()
            start = found.end()
    yield start, end


# --- windows ---------------------------------------------------------------------------------------------------

_WORD = re.compile(r"\S+")
_UNSPACED = re.compile(f"[{_CJK}{_SOUTH_EAST}]")
_MARK = rf"[^\w\s{_CJK}{_SOUTH_EAST}]*"  # punctuation goes with the characters beside it
_UNSPACED_WORD = re.compile(rf"{_MARK}(?:[{_CJK}]{{1,2}}|[{_SOUTH_EAST}]{{1,4}}){_MARK}|[^\s{_CJK}{_SOUTH_EAST}]+")
_LEADING_VOWELS = (
    "\u0e40\u0e41\u0e42\u0e43\u0e44\u0ec0\u0ec1\u0ec2\u0ec3\u0ec4"  # Thai and Lao, written before their letter
)


def _words(text: str) -> list[Span]:
    if not _UNSPACED.search(text):
        return [found.span() for found in _WORD.finditer(text)]
    spans: list[Span] = []
    position = 0
    while found := _UNSPACED_WORD.search(text, position):
        end = found.end()
        while end < len(text) and (unicodedata.category(text[end])[0] == "M" or text[end - 1] in _LEADING_VOWELS):
            if text[end].isspace():
                break
            end += 1
        spans.append((found.start(), end))
        position = end
    return spans


def _windows(text: str, window: int, stride: int) -> Iterator[Span]:
    words = _words(text)
    if not words:
        return
    last = max(0, len(words) - window)
    for first in [*range(0, last, stride), last]:
        yield words[first][0], words[min(first + window, len(words)) - 1][1]
