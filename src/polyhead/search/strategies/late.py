"""Late interaction: every word of the question looks for its own best word in a document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from polyhead.embed.tokens import TokenVectors
from polyhead.errors import InputError
from polyhead.papers import paper
from polyhead.search.late.scoring import best_matches, maxsim
from polyhead.search.strategies.base import Ranking, Reason, Strategy, TokenMatch, best_per_document

if TYPE_CHECKING:
    from polyhead.search.query import EncodedQuery
    from polyhead.search.view import View

__all__ = ["Late"]


@paper("muvera")
@dataclass(frozen=True)
class Late(Strategy):
    """Exact MaxSim over token vectors, among the candidates that MUVERA's encodings find.

    The score of a row is the sum over the question's tokens of the largest cosine with a token of the row. Where a
    view has no more rows than ``candidates``, all are scored and nothing is estimated.

    Args:
        candidates: rows that are scored exactly.
    """

    name: ClassVar[str] = "late"
    summary: ClassVar[str] = "every word of the question finds its best word in the document; needs token vectors"
    uses_tokens: ClassVar[bool] = True
    candidates: int = 100

    def rank(self, query: EncodedQuery, view: View, k: int) -> Ranking:
        """See :class:`Strategy`."""
        late, tokens = view.late, query.tokens
        if late is None or tokens is None:
            raise InputError(
                "The strategy 'late' needs token vectors, and this query or view was made without them. Search through "
                "`search_index` or `polyhead search --strategy late`, which make them."
            )
        if not len(tokens.vectors):
            return Ranking(np.zeros(0, np.int64), np.zeros(0, np.float32), [], "the question has no token of its own")
        encoding = late.encoder.encode_queries(tokens)[0]
        depth = max(self.candidates, k)
        while True:
            rows, estimates = late.nearest(encoding, depth)
            # Several chunks of one document may crowd the candidates.
            if len(np.unique(view.documents[rows])) >= k or len(rows) < depth:
                break
            depth *= 4
        documents = late.tokens(rows)
        scores = maxsim(tokens.vectors, documents)
        best = best_per_document(rows, scores, view, k)
        best = best[np.isfinite(scores[best])]
        reasons = []
        for at in best:
            terms = {"MaxSim": float(scores[at]), "estimate": float(estimates[at] / late.encoder.r_reps)}
            matches = _matches(tokens, documents.take(np.array([at])))
            reasons.append(Reason(0, float(scores[at]) / len(tokens.vectors), terms=terms, matches=matches))
        decision = f"{late.plan}, then exact MaxSim of {len(rows):,} candidates by {len(tokens.vectors):,} tokens"
        return Ranking(rows[best], scores[best], reasons, decision)


def _matches(query: TokenVectors, document: TokenVectors) -> tuple[TokenMatch, ...]:
    """Which token of the row each token of the question met, where their places are known."""
    if query.spans is None or document.spans is None:
        return ()
    met, similarity = best_matches(query.vectors, document.vectors)
    pairs = zip(query.spans.tolist(), document.spans[met].tolist(), similarity.tolist(), strict=True)
    return tuple(TokenMatch((a, b), (c, d), found) for (a, b), (c, d), found in pairs)
