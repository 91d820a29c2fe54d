"""Texts to vectors: the encoding engine, its backends, and the parts of a text."""

from __future__ import annotations

from polyhead.embed.encoder import Encoder
from polyhead.embed.tokens import TokenVectors
from polyhead.embed.types import ChunkEmbeddings, Embeddings, LongTextWarning, Progress

__all__ = ["ChunkEmbeddings", "Embeddings", "Encoder", "LongTextWarning", "Progress", "TokenVectors"]
