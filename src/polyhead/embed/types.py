"""What an encoder gives back, and the small types its parts share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

__all__ = ["ChunkEmbeddings", "Embeddings", "LongTextWarning", "OnLong", "Progress"]

Progress: TypeAlias = Callable[[int, "int | None"], None]
"""Called with how many texts are done and how many there are (``None`` where that is not known)."""

OnLong: TypeAlias = Literal["chunk", "truncate", "error"]
"""What to do with a text of more tokens than the model takes."""


class LongTextWarning(UserWarning):
    """Texts longer than the model takes were split into chunks, or cut because the caller asked for it."""


@dataclass
class Embeddings:
    """Vectors of ``n`` texts, in the order the texts were given.

    Attributes:
        dense: ``[n, dim]`` float32.
        heads: ``[n, layers, heads, head_dim]`` float32, or ``None`` where they were not asked for. Each is the pooled
            output of one attention head before the output projection; it is neither centred nor normalised.
    """

    dense: np.ndarray
    heads: np.ndarray | None

    def __len__(self) -> int:
        return len(self.dense)


@dataclass
class ChunkEmbeddings(Embeddings):
    """Vectors of the ``m >= n`` chunks of ``n`` texts, text after text, chunks of a text in reading order.

    Attributes:
        owner: ``[m]`` int64, the index of the text that the chunk is from.
        start: ``[m]`` int64, where the chunk begins in its text, in characters.
        end: ``[m]`` int64, one past the chunk's last character. The chunks of a text cover all of it.
    """

    owner: np.ndarray
    start: np.ndarray
    end: np.ndarray
