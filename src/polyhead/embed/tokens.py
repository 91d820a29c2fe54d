"""A vector for every token of a text: what late interaction searches with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polyhead.embed.batching import token_batches
from polyhead.embed.chunking import token_windows
from polyhead.errors import InputError

if TYPE_CHECKING:
    from polyhead.embed.backends import Backends
    from polyhead.embed.tokenizer import TextTokenizer
    from polyhead.embed.types import Progress

__all__ = ["TokenVectors", "token_vectors"]


@dataclass
class TokenVectors:
    """Vectors of the tokens of ``n`` texts, end to end.

    Attributes:
        vectors: ``[tokens, dim]``, float32 or float16.
        offsets: ``[n + 1]`` int64; text ``i`` has the vectors ``offsets[i]`` to ``offsets[i + 1]``.
        spans: ``[tokens, 2]`` int64, first character of each token in its text and one past its last; None where they
            are not known.

    Example:
        >>> two = TokenVectors(np.eye(3, dtype=np.float32), np.array([0, 2, 3]))
        >>> len(two), two[0].shape, two.take(np.array([1, 0])).offsets.tolist()
        (2, (2, 3), [0, 1, 3])
    """

    vectors: np.ndarray
    offsets: np.ndarray
    spans: np.ndarray | None = None

    def __post_init__(self) -> None:
        whole = len(self.offsets) and self.offsets[0] == 0 and self.offsets[-1] == len(self.vectors)
        if self.vectors.ndim != 2 or not whole or (np.diff(self.offsets) < 0).any():
            raise InputError(
                f"Token vectors {list(self.vectors.shape)} with offsets {self.offsets[:5].tolist()}...: expected "
                "[tokens, dim], and rising offsets from 0 to the number of tokens."
            )

    @classmethod
    def of(cls, texts: Sequence[np.ndarray]) -> TokenVectors:
        """From one array ``[tokens, dim]`` a text."""
        if not texts:
            raise InputError("No token vectors were given; expected one array [tokens, dim] a text.")
        return cls(np.concatenate(texts), np.concatenate([[0], np.cumsum([len(text) for text in texts])]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, text: int) -> np.ndarray:
        return self.vectors[self.offsets[text] : self.offsets[text + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[text] for text in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """``[n]`` int64, tokens of each text."""
        return np.diff(self.offsets)

    def take(self, texts: np.ndarray) -> TokenVectors:
        """Those of ``texts [m]``, in that order."""
        lengths = self.lengths[texts]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        rows = np.repeat(self.offsets[texts] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return TokenVectors(self.vectors[rows], offsets, None if self.spans is None else self.spans[rows])


def token_vectors(
    texts: Sequence[str], prompt: str, tokenizer: TextTokenizer, backends: Backends, progress: Progress | None = None
) -> TokenVectors:
    """See :meth:`polyhead.embed.Encoder.encode_tokens`."""
    facts = backends.facts
    sequences: list[np.ndarray] = []  # what the model reads
    kept: list[np.ndarray] = []  # which of that are tokens of the text, each once
    owners, spans = [], []
    for number, text in enumerate(texts):
        ids, inner, found, words = tokenizer.content(text, prompt)
        spans.append(found)
        for sequence, keep in _windows(ids, inner, words, facts.max_tokens):
            sequences.append(sequence)
            kept.append(keep)
            owners.append(number)
    lengths = np.array([len(keep) for keep in kept])
    places = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    vectors = np.zeros((places[-1], backends.token_dim), dtype=np.float32)
    done = 0
    for batch in token_batches(sequences, budget=2048, pad_id=facts.pad_id, limit=facts.max_tokens):
        states = backends.token_states(batch)
        for line, row in enumerate(batch.rows):
            vectors[places[row] : places[row + 1]] = states[line, kept[row]]
        done += len(batch.rows)
        if progress is not None:
            progress(done * len(texts) // len(sequences), len(texts))
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    of_text = np.bincount(np.asarray(owners, dtype=np.int64), weights=lengths, minlength=len(texts))
    offsets = np.concatenate([[0], np.cumsum(of_text)]).astype(np.int64)
    return TokenVectors(vectors, offsets, np.concatenate([*spans, np.zeros((0, 2), np.int64)]))


def _windows(
    ids: np.ndarray, inner: tuple[int, int], words: Sequence[int | None], limit: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What the model reads of a text, in one or more pieces, and which tokens of a piece are new ones of the text."""
    first, past = inner
    if len(ids) <= limit:
        yield ids, np.arange(first, past)
        return
    prefix, suffix = ids[:first], ids[past:]
    covered = 0
    for begin, end in token_windows(words, limit - len(prefix) - len(suffix), 0):
        sequence = np.concatenate([prefix, ids[first + begin : first + end], suffix])
        yield sequence, np.arange(len(prefix) + max(begin, covered) - begin, len(prefix) + end - begin)
        covered = end
