"""Ask an index: question in, ranked documents with reasons out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from polyhead.errors import InputError
from polyhead.search.late.words import WordMatch, token_text, word_matches
from polyhead.search.query import encode_queries
from polyhead.search.strategies import DEFAULT_STRATEGY, Strategy, strategy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyhead.embed import Encoder
    from polyhead.search.index import Index
    from polyhead.search.query import EncodedQuery
    from polyhead.search.strategies import HeadShare, Reason

__all__ = ["Hit", "SearchResult", "search_index"]


@dataclass(frozen=True)
class Hit:
    """One document found, by its best chunk.

    Attributes:
        rank: from 1.
        score: falls with rank; comparable within one result only.
        document: id of the document; ``path`` is its file, relative to what was indexed.
        text: of the chunk, characters ``start`` to ``end`` of the document's text.
        answers: the part of the question this hit answers, or None for the whole of it.
        similarity: cosine between that part and the chunk.
        heads: the heads that agreed most, by the model's own layer numbers, counted from 0.
        terms: the numbers behind the score, by name.
        words: which word of the question met which word of the document, in the question's order ("late" alone).
    """

    rank: int
    score: float
    document: str
    path: str
    title: str | None
    heading: str | None
    kind: str
    start: int
    end: int
    text: str
    answers: str | None
    similarity: float
    heads: tuple[HeadShare, ...]
    terms: dict[str, float]
    words: tuple[WordMatch, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        heads = [{"layer": h.layer, "head": h.head, "cosine": h.cosine, "share": h.share} for h in self.heads]
        return {**vars(self), "heads": heads, "words": [vars(word) for word in self.words]}


@dataclass(frozen=True)
class SearchResult:
    """The hits for one question and how they were found.

    Attributes:
        decision: what the strategy decided for this question, in words.
        plan: how the vectors were searched, in words.
        seconds: of encoding the question and of ranking.
    """

    query: str
    strategy: str
    hits: list[Hit]
    decision: str
    plan: str
    parts: int
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {**vars(self), "hits": [hit.to_json() for hit in self.hits]}


def search_index(
    index: Index,
    query: str,
    encoder: Encoder,
    *,
    k: int = 10,
    by: str | Strategy = DEFAULT_STRATEGY,
    where: str | None = None,
    language: str = "en",
    update_tokens: bool = True,
) -> SearchResult:
    """The ``k`` best documents for a question.

    Args:
        index: what to search.
        query: the question, of any length.
        encoder: the one the index was made with.
        k: documents wanted; fewer come back where fewer pass the filter.
        by: a strategy or its name.
        where: a filter, for instance ``"kind = 'pdf' AND modified >= '2026-01-01'"``.
        language: ISO 639-1 code for cutting the question into sentences.
        update_tokens: where the strategy needs token vectors, whether missing ones are made first, which can take as
            long as making the index; else chunks without them are not looked at, and the plan says how many.

    Raises:
        InputError: an empty question, ``k`` below 1, an unknown strategy, a filter that cannot be read.
        IndexMismatchError: the index was made with another model.
    """
    if k < 1:
        raise InputError(f"k is {k}: ask for at least 1 document.")
    chosen = strategy(by)
    index.check(encoder)
    if chosen.uses_tokens and update_tokens:
        index.update_tokens(encoder)
    view = index.view(where)
    if chosen.uses_tokens:
        view.late = index.tokens.view(view)
    started = time.perf_counter()
    mean = index.meta.head_mean if chosen.uses_heads else None
    encoded = encode_queries(
        [query], encoder, head_mean=mean, parts=chosen.uses_parts, tokens=chosen.uses_tokens, language=language
    )[0]
    asked = time.perf_counter()
    if view.n == 0:
        return SearchResult(query, chosen.name, [], "nothing to rank", view.plan, len(encoded.parts), {})
    ranking = chosen.rank(encoded, view, k)
    seconds = {"encode": asked - started, "rank": time.perf_counter() - asked}
    layers = encoder.head_layers
    hits = [
        _hit(number, row, float(score), reason, encoded, layers)
        for number, (row, score, reason) in enumerate(
            zip(view.fetch(ranking.rows), ranking.scores, ranking.reasons, strict=True), start=1
        )
    ]
    return SearchResult(query, chosen.name, hits, ranking.decision, view.plan, len(encoded.parts), seconds)


def _hit(
    rank: int, row: dict[str, Any], score: float, reason: Reason, query: EncodedQuery, layers: Sequence[int]
) -> Hit:
    return Hit(
        rank=rank,
        score=score,
        document=row["doc_id"],
        path=row["path"],
        title=row["title"],
        heading=row["heading"],
        kind=row["kind"],
        start=row["start"],
        end=row["end"],
        text=row["text"],
        answers=query.parts[reason.part].text if reason.part else None,
        similarity=reason.similarity,
        heads=tuple(replace(share, layer=layers[share.layer]) for share in reason.heads),
        terms=reason.terms,
        words=word_matches(query.text, token_text(row["title"], row["start"], row["text"]), reason.matches),
        attributes=json.loads(row["attributes"]) if row["attributes"] else {},
    )
