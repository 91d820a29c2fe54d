"""Tokens met tokens; people want to read which word met which."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyhead.search.strategies.base import TokenMatch

__all__ = ["WordMatch", "token_text", "word_matches"]

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class WordMatch:
    """A word of the question, the word of the document that it met, and the mean cosine of its tokens' matches."""

    query: str
    document: str
    similarity: float


def token_text(title: str | None, start: int, text: str) -> str:
    """The text of a row as it is encoded: with its title before it where the document begins, as its dense vector."""
    title = (title or "").strip()
    opens = text.lstrip()[: len(title)].casefold() == title.casefold()
    return text if start or not title or opens else f"{title}\n{text}"


def word_matches(query: str, row: str, matches: Sequence[TokenMatch]) -> tuple[WordMatch, ...]:
    """Matches of tokens joined to words, in the question's order; a word's partner is its best token's.

    Args:
        query, row: the two texts that the matches count characters of.
        matches: of tokens.
    """
    asked = [found.span() for found in _WORD.finditer(query)] if matches else []
    words: dict[tuple[int, int], list[TokenMatch]] = {}
    for match in matches:
        words.setdefault(_around(match.query, asked), []).append(match)
    there = [found.span() for found in _WORD.finditer(row)] if matches else []
    joined = []
    for (start, end), found in sorted(words.items()):
        first, last = _around(max(found, key=lambda match: match.similarity).row, there)
        joined.append(WordMatch(query[start:end], row[first:last], sum(m.similarity for m in found) / len(found)))
    return tuple(joined)


def _around(token: tuple[int, int], words: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The word that the token's last character is in (a token may begin with the blank before it), else the token."""
    return next((word for word in words if word[0] < token[1] <= word[1]), token)
