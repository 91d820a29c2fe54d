"""Every head compares for itself, and the weighted sum of their cosines ranks: still one vector search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from polyhead.errors import InputError
from polyhead.search.strategies.base import Ranking, Reason, Strategy, documents_near, head_shares

if TYPE_CHECKING:
    from polyhead.search.query import EncodedQuery
    from polyhead.search.view import View

__all__ = ["Heads"]


@dataclass(frozen=True)
class Heads(Strategy):
    """Rank rows by the weighted mean of the cosines of their heads.

    Stored head vectors are centred and unit-normalised per head, so ``sum_h w_h cos_h(q, d)`` is the inner product
    of the row's concatenated heads with the query's, each head of the query scaled by its weight.

    Args:
        weights: ``[layers, heads]`` non-negative weights, for instance the values of a HeadMap; None weighs all alike.
    """

    name: ClassVar[str] = "heads"
    summary: ClassVar[str] = "a weighted sum of per-head cosines"
    uses_heads: ClassVar[bool] = True
    weights: np.ndarray | None = None

    def rank(self, query: EncodedQuery, view: View, k: int) -> Ranking:
        """See :class:`Strategy`."""
        vector = self._heads_of(query)[0]
        scaled = scale_heads(vector, self.weights, query.head_shape)
        rows, scores = documents_near(view, scaled, "heads", k)
        stored = view.vectors(rows, "heads")
        similarity = view.vectors(rows, "dense") @ query.dense[0]
        reasons = [
            Reason(0, float(cosine), head_shares(vector, row, query.head_shape), {"heads": float(score)})
            for cosine, row, score in zip(similarity, stored, scores, strict=True)
        ]
        return Ranking(rows, scores, reasons, "the whole question, head by head")


def scale_heads(vector: np.ndarray, weights: np.ndarray | None, head_shape: tuple[int, int, int]) -> np.ndarray:
    """Scale each head of ``vector`` so that its inner product with a stored row is the weighted mean cosine."""
    layers, heads, head_dim = head_shape
    if weights is None:
        return vector / np.float32(layers * heads)
    weights = np.asarray(weights, dtype=np.float32)
    if weights.shape != (layers, heads):
        raise InputError(
            f"Head weights of shape {weights.shape} were given for an index with {layers} layers x {heads} heads. "
            "Measure them on the same model and the same layers."
        )
    if not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
        raise InputError("Head weights must be finite, not negative and not all zero; clip or shift the HeadMap first.")
    shared = (weights / weights.sum()).reshape(layers * heads, 1)
    return (vector.reshape(layers * heads, head_dim) * shared).reshape(-1)
