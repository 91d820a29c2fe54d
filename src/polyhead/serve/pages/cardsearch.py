"""The catalogue of papers searched by Polyhead itself: cards as vectors, made when they are first needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from polyhead.papers import Paper, catalogue, evidence
from polyhead.search.query import encode_queries
from polyhead.search.strategies import strategy
from polyhead.search.view import ArrayView

if TYPE_CHECKING:
    from polyhead.serve.service import Service

__all__ = ["LIKENESS", "CardSearch", "Found"]

LIKENESS = {
    "method": "what it is, in our summary",
    "task": "what it reports and on what, in our words",
    "data": "the data that its claim was tried on here",
}
"""By what papers can be similar, and where that stands."""

TEXTS_AT_ONCE = 32


class Found(NamedTuple):
    """A card, the part of the question it answers (None: the whole), and the cosine."""

    card: Paper
    answers: str | None
    similarity: float


class CardSearch:
    """Finds cards by meaning. Vectors are kept by their text, so that new evidence is encoded and nothing else.

    Args:
        service: encodes; its other requests come between the cards.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._vectors: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def ask(self, question: str, cards: Sequence[Paper], by: str, k: int) -> list[Found]:
        """The best ``k`` of ``cards`` for a question, by the strategy ``by``: each by its method or what it reports."""
        if not cards:
            return []
        chosen = strategy(by)
        rows = [text for card in cards for text in (aspect(card, "method"), aspect(card, "task")) if text]
        owners = np.array([i for i, card in enumerate(cards) for name in ("method", "task") if aspect(card, name)])
        encoder: Any = self._service.encoder
        asked = encode_queries([question], encoder, parts=chosen.uses_parts)[0]
        ranking = chosen.rank(asked, ArrayView(self._matrix(rows), documents=owners), k)
        return [
            Found(cards[owners[row]], asked.parts[reason.part].text if reason.part else None, reason.similarity)
            for row, reason in zip(ranking.rows, ranking.reasons, strict=True)
        ]

    def similar(self, card: Paper, by: str, k: int) -> list[Found]:
        """The ``k`` cards nearest to one by an aspect of :data:`LIKENESS`; none where it does not have that aspect."""
        own = aspect(card, by)
        others = [
            (other, text) for other in catalogue().values() if other.id != card.id and (text := aspect(other, by))
        ]
        if not own or not others:
            return []
        cosines = self._matrix([text for _, text in others]) @ self._matrix([own])[0]
        order = np.argsort(-cosines, kind="stable")[:k]
        return [Found(others[i][0], None, float(cosines[i])) for i in order]

    def _matrix(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors ``[texts, dim]`` of length 1."""
        with self._lock:
            missing = [text for text in dict.fromkeys(texts) if text not in self._vectors]
            for first in range(0, len(missing), TEXTS_AT_ONCE):
                some = missing[first : first + TEXTS_AT_ONCE]
                self._vectors.update(zip(some, self._service.encode_documents(some), strict=True))
            return np.array([self._vectors[text] for text in texts], np.float32)


def aspect(card: Paper, name: str) -> str:
    """The text of a card's method, task or data; "" where it has none."""
    if name == "method":
        return f"{card.title}. {card.summary}".strip()
    if name == "task":
        return card.claim.strip()
    known = evidence(card.id)
    return "" if known is None else str(known.get("data", ""))
