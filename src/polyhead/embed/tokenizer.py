"""Texts to token ids and long texts to chunks, with the fast tokenizers library alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from polyhead.embed.chunking import Chunk, token_windows
from polyhead.errors import InputError

__all__ = ["TextTokenizer"]


class TextTokenizer:
    """A model's tokenizer, without padding and truncation of its own.

    Args:
        serialised: content of a ``tokenizer.json``.
        max_tokens: the longest input of the model, special tokens included.
    """

    def __init__(self, serialised: str, max_tokens: int) -> None:
        # The library is imported here, as reading an index needs its metadata and not the tokenizer.
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_str(serialised)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._special = {
            token["id"] for token in json.loads(serialised).get("added_tokens", ()) if token.get("special")
        }
        self.max_tokens = max_tokens

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids ``[tokens]`` of each text, special tokens included, nothing cut."""
        return [np.asarray(each.ids, dtype=np.int64) for each in self._tokenizer.encode_batch_fast(list(texts))]

    def prompt_length(self, prompt: str) -> int:
        """How many tokens at the start of an input a prompt takes, a leading special token included."""
        ids = self._tokenizer.encode(prompt).ids
        return len(ids) - 1 if ids and ids[-1] in self._special else len(ids)

    def content(self, text: str, prompt: str = "") -> tuple[np.ndarray, tuple[int, int], np.ndarray, list[int | None]]:
        """A text token by token, nothing cut.

        Returns:
            ids ``[tokens]`` with prompt and special tokens; the first token of the text itself and one past its last;
            the characters ``[own tokens, 2]`` of the text that each of these stands for; and the number of its word.
        """
        encoded = self._tokenizer.encode(prompt + text)
        own = [at for at, sequence in enumerate(encoded.sequence_ids) if sequence is not None]
        first, past = (own[0], own[-1] + 1) if own else (0, 0)
        while first < past and encoded.offsets[first][1] <= len(prompt):
            first += 1
        spans = np.asarray(encoded.offsets[first:past], dtype=np.int64).reshape(-1, 2) - len(prompt)
        ids = np.asarray(encoded.ids, dtype=np.int64)
        return ids, (first, past), np.maximum(spans, 0), encoded.word_ids[first:past]

    def truncate(self, text: str, prompt: str) -> Chunk:
        """The beginning of a text, as much as the model takes."""
        return self._pieces(text, prompt, lambda words, capacity: [(0, min(len(words), capacity))])[0]

    def split(self, text: str, prompt: str, overlap: int | None) -> list[Chunk]:
        """Overlapping chunks of a long text, the prompt in front of each, with character offsets that cover the text.

        Args:
            text: a text of more tokens than the model takes.
            prompt: put in front of each chunk.
            overlap: tokens shared by neighbours; ``None`` takes 32, or a quarter of the room where that is less.
        """

        def windows(words: Sequence[int | None], capacity: int) -> list[tuple[int, int]]:
            return token_windows(words, capacity, min(32, capacity // 4) if overlap is None else overlap)

        chunks = self._pieces(text, prompt, windows)
        last = len(chunks) - 1
        # Characters that make no token (white space at the edges) belong to the first and the last chunk.
        return [
            Chunk(
                chunk.ids, 0 if number == 0 else chunk.start, len(text) if number == last else chunk.end, chunk.weight
            )
            for number, chunk in enumerate(chunks)
        ]

    def _pieces(self, text: str, prompt: str, windows: Any) -> list[Chunk]:
        encoded = self._tokenizer.encode(prompt + text)
        ids = np.asarray(encoded.ids, dtype=np.int64)
        content = [at for at, sequence in enumerate(encoded.sequence_ids) if sequence is not None]
        first, past = content[0], content[-1] + 1
        offsets = encoded.offsets
        while first < past and offsets[first][1] <= len(prompt):
            first += 1
        prefix, suffix = ids[:first], ids[past:]
        capacity = self.max_tokens - len(prefix) - len(suffix)
        if capacity < 1:
            raise InputError(
                f"the prompt and special tokens take {len(prefix) + len(suffix)} tokens, "
                f"and the model takes {self.max_tokens}; use a shorter prompt"
            )
        return [
            Chunk(
                np.concatenate([prefix, ids[first + begin : first + end], suffix]),
                max(0, offsets[first + begin][0] - len(prompt)),
                max(0, offsets[first + end - 1][1] - len(prompt)),
                end - begin,
            )
            for begin, end in windows(encoded.word_ids[first:past], capacity)
        ]
