"""What a strategy sees of token vectors: encodings to search, and the vectors behind them."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from polyhead.embed.tokens import TokenVectors
from polyhead.search.late.muvera import FDEEncoder
from polyhead.search.view import top_k

__all__ = ["ArrayLate", "LateRows"]


class LateRows(Protocol):
    """Token vectors of the rows of a view. Row numbers are the view's."""

    @property
    def encoder(self) -> FDEEncoder:
        """Makes the encodings."""
        ...

    @property
    def plan(self) -> str:
        """How candidates are found, in words, with how many rows have no token vectors."""
        ...

    def nearest(self, encoding: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``[<= count]`` int64, best first, and their inner products with one encoding ``[size]``."""
        ...

    def tokens(self, rows: np.ndarray) -> TokenVectors:
        """Token vectors of ``rows``, with spans."""
        ...


class ArrayLate:
    """Token vectors in memory.

    Args:
        documents: of each row of the view.
        encoder: makes the encodings; fitted to the vectors where it is not.
    """

    def __init__(self, documents: TokenVectors, encoder: FDEEncoder) -> None:
        self.encoder = encoder if encoder.sample_ is not None else encoder.fit(documents.vectors)
        self._documents = documents
        self._encodings = encoder.encode_documents(documents)
        self.plan = f"exact scan of {len(documents):,} encodings of {encoder.size:,} numbers in memory"

    def nearest(self, encoding: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`LateRows`."""
        rows, scores = top_k(encoding[None], self._encodings, min(count, len(self._documents)))
        return rows[0], scores[0]

    def tokens(self, rows: np.ndarray) -> TokenVectors:
        """See :class:`LateRows`."""
        return self._documents.take(rows)
