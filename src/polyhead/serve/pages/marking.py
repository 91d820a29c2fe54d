"""Texts for pages: the words of a question marked in them, and the stretch of a long one that holds the most."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

__all__ = ["excerpt", "marked", "words_of"]

_WORD = re.compile(r"\w+")
# Words that mark nothing: they stand in every text. A question of these alone keeps them.
_COMMON = frozenset(
    """
    a about all an and any are as at be been but by can could did do does for from had has have he her his how i
    if in into is it its may me more most my no not of on one or our she should so some such than that the their
    them then there these they this those to us was we were what when where which who whom why will with without
    would you your
    """.split()  # noqa: SIM905
)
WIDTH = 360
LEAD = 60
_MARKS_LOOKED_AT = 200


def words_of(question: str) -> frozenset[str]:
    """The words of a question that are worth marking, as :func:`_stem` gives them."""
    words = {found.group().casefold() for found in _WORD.finditer(question)}
    return frozenset(map(_stem, words - _COMMON or words))


def marked(text: str, words: frozenset[str]) -> Markup:
    """The text, escaped, with ``<mark>`` around every one of ``words``."""
    pieces, at = [], 0
    for found in _WORD.finditer(text):
        if _stem(found.group()) in words:
            pieces += [escape(text[at : found.start()]), Markup("<mark>"), escape(found.group()), Markup("</mark>")]
            at = found.end()
    return Markup("").join([*pieces, escape(text[at:])])


def excerpt(text: str, words: frozenset[str], width: int = WIDTH) -> tuple[Markup, bool]:
    """About ``width`` characters of a text, where most different ones of ``words`` are; and whether that is not all.

    Blank lines are left out.
    """
    text = re.sub(r"\s*\n\s*", "\n", text.strip())
    if len(text) <= width + LEAD:
        return marked(text, words), False
    marks = [(found.start(), stem) for found in _WORD.finditer(text) if (stem := _stem(found.group())) in words]
    marks = marks[:_MARKS_LOOKED_AT]
    gains = [len({stem for other, stem in marks if at <= other < at + width - LEAD}) for at, _ in marks]
    start = max(0, marks[gains.index(max(gains))][0] - LEAD) if gains else 0
    start = min(start, len(text) - width)
    start = 0 if start == 0 else _at_blank(text, start)
    end = len(text) if start + width >= len(text) else _at_blank(text, start + width)
    before, after = "… " if start else "", " …" if end < len(text) else ""
    return Markup("").join([before, marked(text[start:end].strip(), words), after]), True


def _at_blank(text: str, at: int) -> int:
    """The next blank, if there is one near; else here."""
    blank = re.compile(r"\s").search(text, at, at + 30)
    return blank.start() if blank else at


def _stem(word: str) -> str:
    word = word.casefold()
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
