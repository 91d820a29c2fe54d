"""An encoder without a model: words hashed to vectors. Same interface as ``polyhead.embed.Encoder``, deterministic."""

from __future__ import annotations

import hashlib
import itertools
import re
import time
from collections.abc import Sequence

import numpy as np

from polyhead.embed.tokens import TokenVectors
from polyhead.embed.types import ChunkEmbeddings, Embeddings


class FakeEncoder:
    """Chunks of ``words`` words; a chunk's vector is the sum of its words' vectors; its heads' are slices of that."""

    def __init__(self, name: str = "fake", *, words: int = 20, seed: int = 0, pause: float = 0.0) -> None:
        self.name = name
        self.dim = 24
        self.head_shape = (2, 3, 4)
        self.head_layers = (4, 7)
        self.max_tokens = words
        self.fingerprint = f"fake-{seed}-{words}"
        self.seed = seed
        self.texts: list[str] = []
        self.token_texts: list[str] = []
        self._pause = pause

    def _vector(self, text: str) -> np.ndarray:
        total = np.zeros(self.dim)
        for word in text.lower().split():
            digest = hashlib.blake2b(f"{self.seed}:{word}".encode(), digest_size=self.dim).digest()
            total += np.frombuffer(digest, np.uint8).astype(np.float64) / 127.5 - 1.0
        return total / max(1e-9, np.linalg.norm(total))

    def _embed(self, texts: Sequence[str], heads: bool) -> tuple[np.ndarray, np.ndarray | None]:
        dense = np.array([self._vector(text) for text in texts], dtype=np.float32).reshape(-1, self.dim)
        return dense, (2.0 * dense.reshape(-1, *self.head_shape) + 1.0) if heads else None

    def encode_chunks(self, texts: Sequence[str], *, heads: bool = False, **_: object) -> ChunkEmbeddings:
        self.texts += texts
        chunks, owner, start, end = [], [], [], []
        for number, text in enumerate(texts):
            for begin, stop in self.cut(text):
                chunks.append(text[begin:stop])
                owner.append(number)
                start.append(begin)
                end.append(stop)
        time.sleep(self._pause)
        dense, per_head = self._embed(chunks, heads)
        columns = [np.array(column, dtype=np.int64) for column in (owner, start, end)]
        return ChunkEmbeddings(dense, per_head, *columns)

    def encode_query(self, texts: Sequence[str], *, heads: bool = False, **_: object) -> Embeddings:
        return Embeddings(*self._embed(texts, heads))

    def encode_tokens(self, texts: Sequence[str], *, query: bool = False, **_: object) -> TokenVectors:
        self.token_texts += texts
        words = [[(found.group(), found.span()) for found in re.finditer(r"\S+", text)] for text in texts]
        flat = np.array([self._vector(word) for line in words for word, _ in line], dtype=np.float32)
        spans = np.array([span for line in words for _, span in line], dtype=np.int64).reshape(-1, 2)
        offsets = np.cumsum([0, *(len(line) for line in words)])
        return TokenVectors(flat.reshape(-1, self.dim), offsets, spans)

    def cut(self, text: str) -> list[tuple[int, int]]:
        """Character spans of ``words`` words that cover the text."""
        starts = [i for i, c in enumerate(text) if not c.isspace() and (i == 0 or text[i - 1].isspace())]
        cuts = [0, *starts[self.max_tokens :: self.max_tokens], len(text)]
        return list(itertools.pairwise(cuts))
