"""Late interaction: every token of a question finds its best token in a document, and the finds are added up."""

from __future__ import annotations

import numpy as np

from polyhead.embed.tokens import TokenVectors
from polyhead.errors import InputError

__all__ = ["best_matches", "maxsim"]

SCORES_AT_ONCE = 1 << 22


def maxsim(query: np.ndarray, documents: TokenVectors) -> np.ndarray:
    """Chamfer (MaxSim) similarity of a question with documents: ``sum over q of max over p of <q, p>``.

    Scans in blocks of documents, so that about ``SCORES_AT_ONCE`` scores are held; float16 is widened block by block.

    Args:
        query: ``[query tokens, dim]``.
        documents: vectors of the same ``dim``.

    Returns:
        ``[n]`` float32; ``-inf`` for a document without tokens, which nothing can match.

    Raises:
        InputError: a question without tokens, or vectors of another length.

    Example:
        >>> found = TokenVectors.of([np.eye(2, dtype=np.float32), np.array([[0.6, 0.8]], dtype=np.float32)])
        >>> maxsim(np.array([[1.0, 0.0], [0.0, 1.0]]), found).tolist()
        [2.0, 1.399999976158142]
    """
    query = _checked(query, documents.vectors.shape[1])
    scores = np.full(len(documents), -np.inf, dtype=np.float32)
    tokens = max(1, SCORES_AT_ONCE // len(query))
    first = 0
    while first < len(documents):
        last = int(np.searchsorted(documents.offsets, documents.offsets[first] + tokens, side="right")) - 1
        last = min(max(last, first + 1), len(documents))
        begin, end = documents.offsets[first], documents.offsets[last]
        held = np.flatnonzero(np.diff(documents.offsets[first : last + 1]))
        if len(held):
            block = np.asarray(documents.vectors[begin:end], dtype=np.float32)
            # Documents downwards: the maxima then run over whole lines of memory.
            best = np.maximum.reduceat(block @ query.T, documents.offsets[first:last][held] - begin, axis=0)
            scores[first + held] = best.sum(1)
        first = last
    return scores


def best_matches(query: np.ndarray, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which token of a document each token of a question met.

    Args:
        query: ``[query tokens, dim]``.
        document: ``[tokens, dim]``, at least one.

    Returns:
        ``[query tokens]`` int64 tokens of the document, and their inner products float32: the summands of MaxSim.
    """
    query = _checked(query, document.shape[1])
    if not len(document):
        raise InputError("The document has no token vectors, so no token of it can be met.")
    similarity = query @ np.asarray(document, dtype=np.float32).T
    best = similarity.argmax(1)
    return best, similarity[np.arange(len(query)), best]


def _checked(query: np.ndarray, dim: int) -> np.ndarray:
    if query.ndim != 2 or not len(query) or query.shape[1] != dim:
        raise InputError(
            f"MaxSim needs a question of [tokens, {dim}] with at least one token, got {list(query.shape)}."
        )
    return np.ascontiguousarray(query, dtype=np.float32)
