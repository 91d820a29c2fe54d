"""The contract of a search strategy, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from polyhead.errors import InputError

if TYPE_CHECKING:
    from polyhead.search.query import EncodedQuery
    from polyhead.search.view import View

__all__ = [
    "HeadShare",
    "Ranking",
    "Reason",
    "Strategy",
    "TokenMatch",
    "best_per_document",
    "candidate_rows",
    "documents_near",
    "head_shares",
]


@dataclass(frozen=True)
class HeadShare:
    """How much one head agreed: its cosine, and its share of all positive agreement (sums to 1 over heads)."""

    layer: int
    head: int
    cosine: float
    share: float


@dataclass(frozen=True)
class TokenMatch:
    """A token of the question and the token of the row that it met: their characters, and their cosine.

    ``row`` counts in the row's text as it was encoded (:func:`polyhead.search.late.words.token_text`).
    """

    query: tuple[int, int]
    row: tuple[int, int]
    similarity: float


@dataclass(frozen=True)
class Reason:
    """Why a row is in the ranking.

    Attributes:
        part: index into ``query.parts`` of the part that spoke for the row (0 is the whole question).
        similarity: cosine of that part's dense vector with the row's.
        heads: the heads that agreed most, best first; empty where the strategy had no head vectors.
        terms: the numbers behind the score, by name.
        matches: which token met which, for strategies over tokens.
    """

    part: int
    similarity: float
    heads: tuple[HeadShare, ...] = ()
    terms: dict[str, float] = field(default_factory=dict)
    matches: tuple[TokenMatch, ...] = ()


@dataclass(frozen=True)
class Ranking:
    """Rows of a view, best first, one row a document.

    Attributes:
        rows: ``[k]`` int64 row numbers of the view.
        scores: ``[k]`` float32, falling; comparable only within one ranking.
        reasons: one for each row.
        decision: what the strategy decided for this question, in words.
    """

    rows: np.ndarray
    scores: np.ndarray
    reasons: list[Reason]
    decision: str = ""


class Strategy(ABC):
    """Turns an encoded question into ranked rows with reasons. Knobs are constructor arguments; it holds no state."""

    name: ClassVar[str]
    summary: ClassVar[str]
    uses_parts: ClassVar[bool] = False
    uses_heads: ClassVar[bool] = False
    uses_tokens: ClassVar[bool] = False

    @abstractmethod
    def rank(self, query: EncodedQuery, view: View, k: int) -> Ranking:
        """The ``k`` best documents of ``view`` for ``query``, each by its best row."""

    def _heads_of(self, query: EncodedQuery) -> np.ndarray:
        if query.heads is None:
            raise InputError(
                f"The strategy '{self.name}' needs head vectors, and this query or index was made without them. "
                "Use the strategy 'dense', or build the index again with head vectors."
            )
        return query.heads


def best_per_document(rows: np.ndarray, scores: np.ndarray, view: View, k: int) -> np.ndarray:
    """Positions into ``rows`` of the ``k`` best documents' best rows, best first; ties go to the lower row number."""
    order = np.lexsort((rows, -scores))
    documents = view.documents[rows[order]]
    _, first = np.unique(documents, return_index=True)
    return order[np.sort(first)[:k]]


def documents_near(view: View, query: np.ndarray, column: str, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows ``[r]`` and scores ``[r]`` of the ``k`` best documents for one query vector ``[d]``, one row a document.

    Several chunks of one document may crowd the top, so the search widens until ``k`` documents are found or all
    rows are seen.
    """
    depth = 2 * k
    while True:
        rows, scores = view.nearest(query[None], column, min(depth, view.n))
        found = rows[0] >= 0
        rows, scores = rows[0][found], scores[0][found]
        best = best_per_document(rows, scores, view, k)
        if len(best) >= k or depth >= view.n:
            return rows[best], scores[best]
        depth *= 4


def candidate_rows(view: View, queries: np.ndarray, column: str, depth: int) -> np.ndarray:
    """The rows ``[r]`` (ascending) that are among the ``depth`` nearest of at least one of ``queries [m, d]``."""
    rows, _ = view.nearest(queries, column, min(depth, view.n))
    return np.unique(rows[rows >= 0])


def head_shares(
    query_heads: np.ndarray, row_heads: np.ndarray, head_shape: tuple[int, int, int], top: int = 3
) -> tuple[HeadShare, ...]:
    """The heads that agree most between two prepared head vectors ``[layers * heads * head_dim]``, best first."""
    layers, heads, head_dim = head_shape
    cosines = (query_heads * row_heads).reshape(layers * heads, head_dim).sum(-1)
    positive = np.maximum(cosines, 0.0)
    total = float(positive.sum()) or 1.0
    best = np.argsort(-cosines, kind="stable")[:top]
    return tuple(
        HeadShare(int(i) // heads, int(i) % heads, float(cosines[i]), float(positive[i] / total)) for i in best
    )
