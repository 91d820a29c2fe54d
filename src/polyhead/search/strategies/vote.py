"""Multi-Head RAG's vote: each head ranks for itself, and its votes fall by half with every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from polyhead.errors import InputError
from polyhead.papers import paper
from polyhead.search.strategies.base import Ranking, Reason, Strategy, best_per_document, head_shares

if TYPE_CHECKING:
    from polyhead.search.query import EncodedQuery
    from polyhead.search.view import View

__all__ = ["Vote"]


@paper("mrag")
@dataclass(frozen=True)
class Vote(Strategy):
    """Every head retrieves its own nearest rows and votes ``importance * 2**-rank`` (arXiv 2406.05085, section 2).

    A head's importance is the mean norm of its vectors times the mean cosine distance between them, measured on the
    indexed rows (``head_statistics``). The paper compares raw head vectors; ours are centred first, as stored.

    Args:
        depth: rows each head may vote for.
        decay: factor by which a vote falls with each rank, 2 in the paper.
        uniform: True gives every head the same say (the paper's ablation).
    """

    name: ClassVar[str] = "vote"
    summary: ClassVar[str] = "every head ranks for itself and votes (Multi-Head RAG)"
    uses_heads: ClassVar[bool] = True
    depth: int = 50
    decay: float = 2.0
    uniform: bool = False

    def rank(self, query: EncodedQuery, view: View, k: int) -> Ranking:
        """See :class:`Strategy`."""
        vector = self._heads_of(query)[0]
        layers, heads, head_dim = query.head_shape
        importance = np.ones((layers, heads)) if self.uniform else view.head_importance
        if importance is None:
            raise InputError("This index carries no head importance; build it again, or use Vote(uniform=True).")
        # One query a head: the question's vector with every other head set to zero.
        separate = np.zeros((layers * heads, layers * heads, head_dim), dtype=np.float32)
        index = np.arange(layers * heads)
        separate[index, index] = vector.reshape(layers * heads, head_dim)
        depth = min(max(self.depth, k), view.n)
        rows, _ = view.nearest(separate.reshape(layers * heads, -1), "heads", depth)
        votes = np.asarray(importance, dtype=np.float64).reshape(-1, 1) * self.decay ** -np.arange(
            depth, dtype=np.float64
        )
        found = rows >= 0
        candidates, where = np.unique(rows[found], return_inverse=True)
        totals = np.bincount(where, weights=votes[found], minlength=len(candidates))
        best = best_per_document(candidates, totals, view, k)
        chosen = candidates[best]
        stored = view.vectors(chosen, "heads")
        similarity = view.vectors(chosen, "dense") @ query.dense[0]
        reasons = [
            Reason(0, float(cosine), head_shares(vector, row, query.head_shape), {"votes": float(total)})
            for cosine, row, total in zip(similarity, stored, totals[best], strict=True)
        ]
        return Ranking(chosen, totals[best].astype(np.float32), reasons, f"votes of {layers * heads} heads")
