"""MUVERA: many vectors a text as one long vector whose inner product stands for MaxSim (arXiv 2405.19504)."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse

from polyhead.embed.tokens import TokenVectors
from polyhead.errors import InputError
from polyhead.papers import paper
from polyhead.search.late.scoring import maxsim
from polyhead.search.view import top_k

__all__ = ["FDEEncoder", "MuveraIndex", "default_encoder"]

TOKENS_AT_ONCE = 1 << 14


@paper("muvera")
class FDEEncoder:
    """Fixed dimensional encodings of sets of vectors.

    ``k_sim`` random hyperplanes sort token vectors into ``2^k_sim`` buckets (SimHash). A question's block for a bucket
    is the *sum* of its tokens in it, a document's is their *mean*, so that a question's token meets a document's token
    of its own neighbourhood. Each block is projected by random signs to ``d_proj`` numbers; all this is done ``r_reps``
    times with fresh randomness and put end to end. ``<query, document> / r_reps`` is an estimate of MaxSim.

    A mean is less than a maximum, and the more so the more tokens a document has, so that the estimate is unfair to
    long documents. :meth:`fit` (not in the paper) takes a sample of token vectors and gives every document one more
    number: how much its estimate falls short of MaxSim on average over that sample, a token. A question's number is how
    many tokens it has, times ``r_reps``.

    Args:
        dim: of the token vectors.
        k_sim: hyperplanes a repetition; 0 has one bucket.
        r_reps: repetitions.
        d_proj: numbers a bucket; None leaves blocks as they are (``dim`` numbers, no projection).
        final_dim: a last random projection (a count sketch: each number is added to one of ``final_dim`` places with
            a random sign) of the whole encoding; None leaves it out.
        fill_empty: give an empty bucket of a document the token whose hash differs from the bucket's in the fewest
            signs (the bucket of the lowest number, and in it the first token, where several do).
        seed: of all that is random; two encoders of one seed and shape are the same.

    Attributes:
        planes: ``[r_reps, dim, k_sim]``; ``signs``: ``[r_reps, dim, d_proj]`` or None.
        size: numbers in an encoding.
        sample_: ``[tokens, dim]`` that :meth:`fit` keeps; None before.

    Example:
        >>> encoder = FDEEncoder(4, k_sim=2, r_reps=3, d_proj=2)
        >>> encoder.size, encoder.encode_documents(TokenVectors.of([np.eye(4), np.ones((1, 4))])).shape
        (24, (2, 24))
    """

    def __init__(
        self,
        dim: int,
        *,
        k_sim: int = 5,
        r_reps: int = 20,
        d_proj: int | None = 16,
        final_dim: int | None = None,
        fill_empty: bool = True,
        seed: int = 0,
    ) -> None:
        sizes = {"dim": dim, "r_reps": r_reps, "d_proj": d_proj or 1, "final_dim": final_dim or 1}
        if min(sizes.values()) < 1 or not 0 <= k_sim <= 16 or (d_proj or 1) > dim:
            raise InputError(
                f"k_sim={k_sim}, d_proj={d_proj}, {sizes} were given; expected sizes of at least 1, k_sim of 0 to 16, "
                "and d_proj of at most dim."
            )
        self.dim, self.k_sim, self.r_reps, self.d_proj = dim, k_sim, r_reps, d_proj
        self.final_dim, self.fill_empty, self.seed = final_dim, fill_empty, seed
        generator = np.random.default_rng(seed)
        self.planes = generator.standard_normal((r_reps, dim, k_sim)).astype(np.float32)
        self.signs = None
        if d_proj is not None:
            self.signs = (2.0 * generator.integers(0, 2, (r_reps, dim, d_proj)) - 1.0).astype(np.float32)
        self._sketch = None
        whole = r_reps * 2**k_sim * (d_proj or dim)
        if final_dim is not None:
            signs = 2.0 * generator.integers(0, 2, whole) - 1.0
            places = generator.integers(0, final_dim, whole)
            entries = (signs.astype(np.float32), (np.arange(whole), places))
            self._sketch = sparse.csr_matrix(entries, shape=(whole, final_dim))
        self._whole = final_dim or whole
        self.sample_: np.ndarray | None = None
        self._sample_encoding = np.zeros(self._whole, dtype=np.float32)

    @property
    def size(self) -> int:
        """Numbers in an encoding, one more once fitted."""
        return self._whole + (self.sample_ is not None)

    def fit(self, tokens: np.ndarray, *, count: int = 256) -> FDEEncoder:
        """Keep ``count`` of the token vectors ``[tokens, dim]``, drawn at random, to measure shortfalls by.

        Raises:
            InputError: no vectors, or of another length.
        """
        if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] != self.dim:
            raise InputError(f"A sample of [tokens, {self.dim}] was expected, got {list(tokens.shape)}.")
        drawn = np.random.default_rng(self.seed).permutation(len(tokens))[:count]
        self.sample_ = np.asarray(tokens[drawn], dtype=np.float32)
        one = TokenVectors(self.sample_, np.array([0, len(self.sample_)]))
        self._sample_encoding = self._block(one, document=False)[0] / (self.r_reps * len(self.sample_))
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """What makes another encoder the same: constructor arguments."""
        names = ("dim", "k_sim", "r_reps", "d_proj", "final_dim", "fill_empty", "seed")
        return {name: getattr(self, name) for name in names}

    def encode_queries(self, queries: TokenVectors) -> np.ndarray:
        """``[n, size]`` float32: sums a bucket; a question without tokens is zeros."""
        return self._encode(queries, document=False)

    def encode_documents(self, documents: TokenVectors) -> np.ndarray:
        """``[n, size]`` float32: means a bucket, empty ones filled; a document without tokens is zeros."""
        return self._encode(documents, document=True)

    def _encode(self, texts: TokenVectors, *, document: bool) -> np.ndarray:
        if texts.vectors.shape[1] != self.dim:
            raise InputError(f"The vectors have {texts.vectors.shape[1]} numbers, this encoder takes {self.dim}.")
        result = np.zeros((len(texts), self.size), dtype=np.float32)
        first = 0
        while first < len(texts):
            last = int(np.searchsorted(texts.offsets, texts.offsets[first] + TOKENS_AT_ONCE, side="right")) - 1
            last = min(max(last, first + 1), len(texts))
            some = texts.take(np.arange(first, last))
            result[first:last, : self._whole] = self._block(some, document)
            if self.sample_ is not None and document:
                result[first:last, -1] = self._shortfall(some, result[first:last, : self._whole])
            first = last
        if self.sample_ is not None and not document:
            result[:, -1] = self.r_reps * texts.lengths
        return result

    def _shortfall(self, texts: TokenVectors, encodings: np.ndarray) -> np.ndarray:
        """``[n]``: MaxSim less its estimate, the mean over the tokens of the sample; 0 for texts without tokens."""
        assert self.sample_ is not None
        exact = maxsim(self.sample_, texts) / np.float32(len(self.sample_))
        return np.where(texts.lengths > 0, exact - encodings @ self._sample_encoding, np.float32(0))

    def _block(self, texts: TokenVectors, document: bool) -> np.ndarray:
        """Encodings ``[n, size]`` of a few texts."""
        vectors = np.asarray(texts.vectors, dtype=np.float32)
        n, buckets, width = len(texts), 2**self.k_sim, self.d_proj or self.dim
        owners = np.repeat(np.arange(n), texts.lengths)
        whole = np.zeros((n, self.r_reps, buckets, width), dtype=np.float32)
        for repetition in range(self.r_reps):
            hashes = (vectors @ self.planes[repetition] > 0) @ (1 << np.arange(self.k_sim))
            projected = vectors
            if self.signs is not None:  # linear, so that it may come before sums and means
                projected = vectors @ (self.signs[repetition] / np.float32(width**0.5))
            whole[:, repetition] = self._sums(projected, owners * buckets + hashes, n, document)
        flat = whole.reshape(n, -1)
        return flat if self._sketch is None else flat @ self._sketch

    def _sums(self, tokens: np.ndarray, places: np.ndarray, n: int, document: bool) -> np.ndarray:
        """``[n, buckets, width]`` of tokens ``[tokens, width]``; ``places [tokens]`` number text and bucket of each."""
        buckets = 2**self.k_sim
        ones = np.ones(len(places), dtype=np.float32)
        members = sparse.csr_matrix((ones, (places, np.arange(len(places)))), shape=(n * buckets, len(places)))
        sums = members @ tokens
        if not document:
            return sums.reshape(n, buckets, -1)
        counts = np.bincount(places, minlength=n * buckets)
        means = sums / np.maximum(counts, 1)[:, None].astype(np.float32)
        if self.fill_empty and len(places):
            first = np.zeros(n * buckets, dtype=np.int64)
            first[places[::-1]] = np.arange(len(places))[::-1]  # the last to be written stays: the first token
            empty = counts.reshape(n, buckets) == 0
            text, bucket = np.nonzero(empty & ~empty.all(1, keepdims=True))
            distance = np.where(empty[text], self.k_sim + 1, _hamming(self.k_sim)[bucket])
            means[text * buckets + bucket] = tokens[first[text * buckets + distance.argmin(1)]]
        return means.reshape(n, buckets, -1)


def default_encoder(dim: int) -> FDEEncoder:
    """The encodings that indexes keep; ``docs/late.md`` tells how they were chosen."""
    return FDEEncoder(dim, k_sim=4, r_reps=20, d_proj=min(16, dim))


def _hamming(k: int) -> np.ndarray:
    """Hamming distances ``[2^k, 2^k]`` between the numbers of buckets."""
    numbers = np.arange(2**k)
    return np.bitwise_count(numbers[:, None] ^ numbers[None, :]).astype(np.int64)


@paper("muvera")
class MuveraIndex:
    """Two-stage search over token vectors in memory: encodings give candidates, exact MaxSim puts them in order.

    Args:
        encoder: makes the encodings.
        documents: their token vectors.

    Example:
        >>> documents = TokenVectors.of([np.eye(8)[:3], np.eye(8)[3:5], np.eye(8)[5:]])
        >>> rows, scores = MuveraIndex(FDEEncoder(8, k_sim=2, d_proj=4), documents).search(np.eye(8)[3:5], k=1)
        >>> rows.tolist(), scores.tolist()
        ([1], [2.0])
    """

    def __init__(self, encoder: FDEEncoder, documents: TokenVectors) -> None:
        self.encoder, self.documents = encoder, documents
        self.encodings = encoder.encode_documents(documents)

    def candidates(self, query: np.ndarray, count: int) -> np.ndarray:
        """The ``count`` documents whose encodings have the largest inner products with the question's, best first."""
        one = TokenVectors(query, np.array([0, len(query)]))
        rows, _ = top_k(self.encoder.encode_queries(one), self.encodings, min(count, len(self.documents)))
        return rows[0]

    def search(self, query: np.ndarray, k: int = 10, *, candidates: int = 100) -> tuple[np.ndarray, np.ndarray]:
        """Documents ``[k]`` and exact MaxSim ``[k]`` of a question ``[tokens, dim]``, best first."""
        if k < 1 or candidates < k:
            raise InputError(
                f"k={k} of {candidates} candidates was asked for; expected k >= 1 and not more than those."
            )
        rows = self.candidates(query, candidates)
        scores = maxsim(query, self.documents.take(rows))
        order = np.lexsort((rows, -scores))[:k]
        return rows[order], scores[order]
