"""The default: dense, parts and heads together, and the corpus decides how many things were asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy.special import logsumexp

from polyhead.papers import paper
from polyhead.search.strategies.base import (
    HeadShare,
    Ranking,
    Reason,
    Strategy,
    best_per_document,
    candidate_rows,
    head_shares,
)

if TYPE_CHECKING:
    from polyhead.search.query import EncodedQuery
    from polyhead.search.view import View

__all__ = ["Aspects"]


@paper("aspect-doc-embeddings")
@dataclass(frozen=True)
class Aspects(Strategy):
    """Let every part of a question speak for the documents it singles out, where it finds more than the whole does.

    With ``s(p, d) = (cos_dense + head_weight * cos_heads) / (1 + head_weight)``, ``cos_heads`` the mean of the per-head
    cosines, and ``spread`` the standard deviation of ``cos_dense`` between random rows of the index:

    1. *Competition.* ``log P(d | p) = s(p, d) / T - logsumexp over p's nearest``, ``T = temperature * spread``.
       A part that is near to everything singles out nothing and wins little.
    2. *The right to speak.* A part answers only if the corpus holds something nearer to it than anything is to the
       whole question. Short of ``top(whole) + margin * spread * coverage(p)`` it is charged the shortfall over ``T``.
       A part that is most of the question (large coverage) must beat the whole clearly; one clause of a long story
       need only match it. This is how the default tells one-topic from many-topic questions.
    3. ``score(d) = max over p`` of the two together; the part that gives the maximum is the one the hit answers.

    Knobs were chosen on every second query of mrag-wikipedia and cranfield; ``docs/search.md`` gives both halves.

    Args:
        temperature: in units of the index's spread.
        margin: in units of the index's spread, times the part's coverage.
        head_weight: weight of the head cosines beside the dense cosine; 0 or an index without heads leaves them out.
        depth: nearest rows that each part brings as candidates, and the size of its competition.
    """

    name: ClassVar[str] = "aspects"
    summary: ClassVar[str] = "dense, parts and heads together; tells by itself how many things were asked"
    uses_parts: ClassVar[bool] = True
    uses_heads: ClassVar[bool] = True
    temperature: float = 0.5
    margin: float = 2.0
    head_weight: float = 0.15
    depth: int = 100

    def rank(self, query: EncodedQuery, view: View, k: int) -> Ranking:
        """See :class:`Strategy`."""
        candidates = candidate_rows(view, query.dense, "dense", max(self.depth, 2 * k))
        if len(candidates) == 0:
            return Ranking(candidates, np.zeros(0, np.float32), [])
        dense = query.dense @ view.vectors(candidates, "dense").T  # [parts, candidates]
        stored = view.vectors(candidates, "heads") if query.heads is not None and self.head_weight else None
        similarity = dense
        if stored is not None and query.heads is not None:
            layers, heads, _ = query.head_shape
            similarity = dense + self.head_weight * (query.heads @ stored.T) / (layers * heads)
            similarity = similarity / (1.0 + self.head_weight)
        spread = max(view.spread, 1e-6)
        evidence = self._competition(similarity, view.documents[candidates], self.temperature * spread)
        top = similarity.max(1)
        due = top[0] + self.margin * spread * query.coverage
        charge = np.maximum(0.0, due - top) / (self.temperature * spread)
        charge[0] = 0.0
        total = evidence - charge[:, None]
        speaking = total.argmax(0)
        scores = total.max(0)
        best = best_per_document(candidates, scores, view, k)
        reasons = []
        for i in best:
            part = int(speaking[i])
            shares: tuple[HeadShare, ...] = ()
            if stored is not None and query.heads is not None:
                shares = head_shares(query.heads[part], stored[i], query.head_shape)
            terms = {"log share among rivals": float(evidence[part, i]), "charge for the part": float(charge[part])}
            reasons.append(Reason(part, float(dense[part, i]), shares, terms))
        return Ranking(
            candidates[best], scores[best].astype(np.float32), reasons, self._decision(query, reasons, charge)
        )

    def _competition(self, similarity: np.ndarray, documents: np.ndarray, temperature: float) -> np.ndarray:
        """Log of each candidate's share ``[parts, candidates]`` among a part's ``depth`` nearest documents."""
        # Chunks of one document do not compete with each other: each document stands by its best chunk.
        order = np.argsort(documents, kind="stable")
        starts = np.flatnonzero(np.diff(documents[order], prepend=-1))
        per_document = np.maximum.reduceat(similarity[:, order], starts, axis=1)
        rivals = min(self.depth, per_document.shape[1])
        nearest = np.partition(per_document, -rivals, axis=1)[:, -rivals:]
        return similarity / temperature - logsumexp(nearest / temperature, axis=1, keepdims=True)

    @staticmethod
    def _decision(query: EncodedQuery, reasons: list[Reason], charge: np.ndarray) -> str:
        free = int((charge[1:] == 0).sum())
        by_part = sum(reason.part != 0 for reason in reasons)
        if len(charge) == 1:
            return "asks one thing: it is too short to have parts"
        if by_part == 0:
            return f"asks one thing: the whole question found nearer documents than any of its {len(charge) - 1} parts"
        return (
            f"asks several things: {free} of {len(charge) - 1} parts found something nearer than the whole did, "
            f"and {by_part} of {len(reasons)} hits answer a part"
        )
