"""Run search strategies over a data set with an encoder, exactly and in memory."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from polyhead import __version__
from polyhead.evaluate.datasets import RetrievalData, load_retrieval
from polyhead.evaluate.retrieval import RetrievalReport, evaluate_runs
from polyhead.search.heads import head_statistics, prepare_heads
from polyhead.search.late.muvera import default_encoder
from polyhead.search.late.rows import ArrayLate
from polyhead.search.query import encode_queries
from polyhead.search.strategies import STRATEGIES, Strategy, strategy
from polyhead.search.view import ArrayView

if TYPE_CHECKING:
    from polyhead.embed import ChunkEmbeddings, Encoder

__all__ = ["evaluate_retrieval", "rank_all"]

DEPTH = 100
QUERY_BATCH = 32

Progress = Callable[[int, "int | None"], None]


def evaluate_retrieval(
    data: str | RetrievalData,
    encoder: Encoder,
    *,
    strategies: Sequence[str | Strategy] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> RetrievalReport:
    """Measure strategies on a data set; the first one named is tested against the others.

    Args:
        data: a name or folder, see :func:`polyhead.evaluate.datasets.load_retrieval`.
        encoder: encodes documents (in chunks where they are long) and questions.
        strategies: by default all but those over token vectors, the default strategy first.
        seed: of the statistics.
        progress: called with texts encoded and texts to encode.
    """
    found = load_retrieval(data) if isinstance(data, str) else data
    chosen = [
        strategy(one) for one in strategies or [name for name, kind in STRATEGIES.items() if not kind.uses_tokens]
    ]
    runs = rank_all(found, encoder, chosen, progress=progress)
    meta = {
        "model": encoder.name,
        "fingerprint": encoder.fingerprint,
        "backend": encoder.backend,
        "strategies": {one.name: {k: v for k, v in vars(one).items() if v is not None} for one in chosen},
        "depth": DEPTH,
        "versions": {
            "polyhead": __version__,
            **{name: version(name) for name in ("transformers", "torch", "ir-measures")},
        },
        "machine": platform.machine(),
    }
    return evaluate_runs(found, runs, seed=seed, meta=meta)


def rank_all(
    data: RetrievalData,
    encoder: Encoder,
    strategies: Sequence[Strategy],
    *,
    depth: int = DEPTH,
    progress: Progress | None = None,
) -> dict[str, dict[str, list[tuple[str, float]]]]:
    """Rank every question with every strategy: strategy -> query id -> ``(document id, score)``, best first."""
    tell = progress or (lambda done, total: None)
    names = list(data.corpus)
    total = len(names) + len(data.queries)
    needs_heads = any(one.uses_heads for one in strategies)
    needs_parts = any(one.uses_parts for one in strategies)
    encoded = encoder.encode_chunks(list(data.corpus.values()), heads=needs_heads)
    tell(len(names), total)
    mean, importance, heads = None, None, None
    if encoded.heads is not None:
        mean, importance = head_statistics(encoded.heads)
        heads = prepare_heads(encoded.heads, mean).astype(np.float16)  # as an index keeps them
    needs_tokens = any(one.uses_tokens for one in strategies)
    late = _late(list(data.corpus.values()), encoded, encoder) if needs_tokens else None
    view = ArrayView(encoded.dense, heads, documents=encoded.owner, head_importance=importance, late=late)
    runs: dict[str, dict[str, list[tuple[str, float]]]] = {one.name: {} for one in strategies}
    ids, texts = list(data.queries), list(data.queries.values())
    for start in range(0, len(ids), QUERY_BATCH):
        some = texts[start : start + QUERY_BATCH]
        batch = encode_queries(some, encoder, head_mean=mean, parts=needs_parts, tokens=needs_tokens)
        for query_id, query in zip(ids[start : start + QUERY_BATCH], batch, strict=True):
            for one in strategies:
                ranking = one.rank(query, view, depth)
                found = view.documents[ranking.rows]
                runs[one.name][query_id] = [
                    (names[int(document)], float(score)) for document, score in zip(found, ranking.scores, strict=True)
                ]
        tell(len(names) + start + len(batch), total)
    return runs


def _late(texts: Sequence[str], chunks: ChunkEmbeddings, encoder: Encoder) -> ArrayLate:
    """Token vectors of the chunks, as an index keeps them."""
    spans = zip(chunks.owner.tolist(), chunks.start.tolist(), chunks.end.tolist(), strict=True)
    tokens = encoder.encode_tokens([texts[owner][start:end] for owner, start, end in spans])
    return ArrayLate(tokens, default_encoder(tokens.vectors.shape[1]))
