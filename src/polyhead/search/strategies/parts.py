"""The best part of the question speaks for each document, corrected for parts that are close to everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from polyhead.papers import paper
from polyhead.search.strategies.base import Ranking, Reason, Strategy, best_per_document, candidate_rows

if TYPE_CHECKING:
    from polyhead.search.query import EncodedQuery
    from polyhead.search.view import View

__all__ = ["Parts"]


@paper("aspect-doc-embeddings")
@dataclass(frozen=True)
class Parts(Strategy):
    """Score a row by its best part: ``max_p (cos(p, d) - hubness * mean of p's nearest cosines)``.

    The correction is the query side of cross-domain similarity local scaling: a part such as "in the end, it was"
    that is near to everything wins nothing by it. Aspects come from the question's own words here, not from trained
    aspect encoders as in arXiv 2203.14541; the idea shared is one vector an aspect.

    Args:
        hubness: share of the neighbourhood mean taken off, between 0 and 1.
        neighbours: how many nearest rows make the neighbourhood.
        depth: nearest rows each part brings as candidates.
    """

    name: ClassVar[str] = "parts"
    summary: ClassVar[str] = "the best part of the question for each document"
    uses_parts: ClassVar[bool] = True
    hubness: float = 0.8
    neighbours: int = 10
    depth: int = 100

    def rank(self, query: EncodedQuery, view: View, k: int) -> Ranking:
        """See :class:`Strategy`."""
        candidates = candidate_rows(view, query.dense, "dense", max(self.depth, 2 * k))
        similarity = query.dense @ view.vectors(candidates, "dense").T  # [parts, candidates]
        near = min(self.neighbours, len(candidates))
        if near == 0:
            return Ranking(candidates, np.zeros(0, np.float32), [])
        hub = np.partition(similarity, -near, axis=1)[:, -near:].mean(1, keepdims=True)
        corrected = similarity - self.hubness * hub
        speaking = corrected.argmax(0)
        scores = corrected.max(0)
        best = best_per_document(candidates, scores, view, k)
        reasons = [
            Reason(int(speaking[i]), float(similarity[speaking[i], i]), terms={"corrected cosine": float(scores[i])})
            for i in best
        ]
        return Ranking(
            candidates[best], scores[best], reasons, f"{len(query.parts)} parts, the best one for each document"
        )
