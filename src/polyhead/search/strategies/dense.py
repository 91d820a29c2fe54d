"""One vector a question, one vector a row: the ordinary dense search, and the baseline of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyhead.search.strategies.base import Ranking, Reason, Strategy, documents_near

if TYPE_CHECKING:
    from polyhead.search.query import EncodedQuery
    from polyhead.search.view import View

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(Strategy):
    """Rank rows by the inner product of their dense vector with the whole question's."""

    name: ClassVar[str] = "dense"
    summary: ClassVar[str] = "one vector for the whole question"

    def rank(self, query: EncodedQuery, view: View, k: int) -> Ranking:
        """See :class:`Strategy`."""
        rows, scores = documents_near(view, query.dense[0], "dense", k)
        reasons = [Reason(0, float(score), terms={"cosine": float(score)}) for score in scores]
        return Ranking(rows, scores, reasons, "the whole question as one vector")
