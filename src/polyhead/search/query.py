"""A question made ready for every strategy: its parts and the vectors of each, from one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from polyhead.embed.parts import Part, split_parts
from polyhead.errors import InputError
from polyhead.search.heads import prepare_heads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyhead.embed import Encoder, TokenVectors

__all__ = ["EncodedQuery", "encode_queries", "query_parts"]

WINDOW_WORDS, WINDOW_STRIDE = 8, 4
FINE_WINDOW_WORDS, FINE_WINDOW_STRIDE = 5, 2
LONG_QUESTION_WORDS = 40


@dataclass(frozen=True)
class EncodedQuery:
    """One question, whole and in parts.

    Attributes:
        text: the question as it was asked.
        parts: the whole question first, then its parts in the order of ``split_parts``.
        coverage: ``[parts]`` float32, share of the question's words (characters where it has no spaces).
        dense: ``[parts, dim]`` float32 vectors as the encoder gives them.
        heads: ``[parts, layers * heads * head_dim]`` float32, centred and unit-normalised per head, or None.
        head_shape: ``(layers, heads, head_dim)``.
        tokens: the token vectors of the whole question with their places in it, or None.
    """

    text: str
    parts: tuple[Part, ...]
    coverage: np.ndarray
    dense: np.ndarray
    heads: np.ndarray | None
    head_shape: tuple[int, int, int]
    tokens: TokenVectors | None = None

    @property
    def whole(self) -> EncodedQuery:
        """The same question with no parts but itself."""
        heads = None if self.heads is None else self.heads[:1]
        return replace(self, parts=self.parts[:1], coverage=self.coverage[:1], dense=self.dense[:1], heads=heads)


def query_parts(text: str, *, language: str = "en") -> tuple[Part, ...]:
    """The whole question, its sentences and clauses, and overlapping windows of 8 words.

    A question of 40 words or more is also cut into windows of 5 words: in a long story an aspect may be named in
    passing, while in a short question so small a window is mostly out of context (measured in ``docs/search.md``).
    """
    if not text.strip():
        raise InputError("The query is empty. Expected at least one word; give the question as text.")
    parts = split_parts(text, window=WINDOW_WORDS, stride=WINDOW_STRIDE, language=language)
    if len(text.split()) >= LONG_QUESTION_WORDS:
        parts += split_parts(text, ("window",), window=FINE_WINDOW_WORDS, stride=FINE_WINDOW_STRIDE, language=language)
    start = len(text) - len(text.lstrip())
    whole = Part(text.strip(), start, start + len(text.strip()), "whole")
    seen = {(whole.start, whole.end)}
    kept = [whole]
    for part in parts:
        if (part.start, part.end) not in seen:
            seen.add((part.start, part.end))
            kept.append(part)
    return tuple(kept)


def _coverage(parts: Sequence[Part]) -> np.ndarray:
    whole = parts[0].text
    size = (lambda text: len(text.split())) if len(whole.split()) > 1 else len
    return np.array([min(1.0, size(part.text) / max(1, size(whole))) for part in parts], dtype=np.float32)


def encode_queries(
    texts: Sequence[str],
    encoder: Encoder,
    *,
    head_mean: np.ndarray | None = None,
    parts: bool = True,
    tokens: bool = False,
    language: str = "en",
) -> list[EncodedQuery]:
    """Encode questions with all their parts in one batch.

    Args:
        texts: the questions.
        encoder: gives ``encode_query(texts, heads=...)``.
        head_mean: ``[layers, heads, head_dim]`` mean of the indexed head vectors; None leaves head vectors out.
        parts: False keeps only the whole question.
        tokens: whether to give token vectors of the whole question too.
        language: ISO 639-1 code for the sentence segmenter.
    """
    split = [query_parts(text, language=language) for text in texts]
    if not parts:
        split = [pieces[:1] for pieces in split]
    flat = sorted({piece.text for pieces in split for piece in pieces})
    encoded = encoder.encode_query(flat, heads=head_mean is not None)
    place = {text: row for row, text in enumerate(flat)}
    prepared = None
    if head_mean is not None and encoded.heads is not None:
        prepared = prepare_heads(encoded.heads, head_mean)
    by_token = encoder.encode_tokens(texts, query=True) if tokens else None
    result = []
    for number, (text, pieces) in enumerate(zip(texts, split, strict=True)):
        rows = np.array([place[piece.text] for piece in pieces])
        heads = None if prepared is None else prepared[rows]
        words = None if by_token is None else by_token.take(np.array([number]))
        result.append(
            EncodedQuery(text, pieces, _coverage(pieces), encoded.dense[rows], heads, encoder.head_shape, words)
        )
    return result
