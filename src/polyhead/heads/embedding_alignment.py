"""Two models compared, and vectors carried from one to the other, through the vocabulary they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.heads.embedding_space import EmbeddingSpace
from polyhead.model import HeadedModel
from polyhead.papers import paper

__all__ = ["Alignment", "align_layers", "translate"]

Part = Literal["ffn-values", "ffn-keys", "query", "key", "value", "output"]
_READ, _WRITTEN = ("ffn-keys", "query", "key", "value"), ("ffn-values", "output")
Tokens = Sequence[int] | torch.Tensor | None


@dataclass(frozen=True)
class Alignment:
    """How alike the layers of two models are.

    Attributes:
        values: ``[layers_a, layers_b]`` mean over rows of the best Pearson correlation with a row of the other layer.
        rows: ``[layers_a, layers_b, rows_a + rows_b]`` the best correlation of every row, those of the first model's
            layer first.
        part, space: what was compared, and where.
    """

    values: np.ndarray
    rows: np.ndarray
    part: Part
    space: str

    def matching(self) -> list[int]:
        """The layer of the second model that each layer of the first is paired with, so that the sum is largest."""
        from scipy.optimize import linear_sum_assignment

        return [int(column) for column in linear_sum_assignment(-self.values)[1]]


@paper("embedding-space-transformers")
def align_layers(
    first: HeadedModel | EmbeddingSpace,
    second: HeadedModel | EmbeddingSpace,
    part: Part = "ffn-values",
    *,
    space: Literal["vocabulary", "hidden"] = "vocabulary",
    tokens: Tokens = None,
) -> Alignment:
    """How alike each layer of one model is to each of another, by what its parameters say of the vocabulary.

    Each parameter row (a memory, or a feature of a head) is a vector over the vocabulary, ``r E^T``; its best Pearson
    correlation with a row of the other layer counts, and the mean over the rows of both. With ``E`` centred over tokens
    the correlation of ``r E_1^T`` and ``s E_2^T`` is ``r G_12 s^T / sqrt(r G_11 r^T  s G_22 s^T)`` with
    ``G_ij = E_i^T E_j`` hidden x hidden: exact, and nothing as wide as the vocabulary is held.

    Args:
        first, second: models of one vocabulary (the same token ids).
        part: which parameters; those of the feed-forward layers ("ffn-"), or of all heads of a layer.
        space: "hidden" correlates over the features of the stream instead, to compare with.
        tokens: ids over which to correlate; None for all.

    Raises:
        InputError: vocabularies, or for "hidden" streams, of different sizes.

    Example:
        >>> found = align_layers(load("model-of-seed-0"), load("model-of-seed-1"))  # doctest: +SKIP
        >>> found.matching()  # doctest: +SKIP
        [0, 1, 2, 3]
    """
    if part not in (*_READ, *_WRITTEN) or space not in ("vocabulary", "hidden"):
        raise InputError(
            f"part {part!r} in space {space!r} was asked for, expected one of {', '.join((*_READ, *_WRITTEN))} in "
            "'vocabulary' or 'hidden'."
        )
    a, b = (model if isinstance(model, EmbeddingSpace) else EmbeddingSpace(model) for model in (first, second))
    if space == "vocabulary":
        own_a, own_b, cross = _grams(a, b, "target" if part in _WRITTEN else "source", tokens)
    else:
        if a.weights.hidden != b.weights.hidden:
            raise InputError(f"Streams of {a.weights.hidden} and {b.weights.hidden} features cannot be correlated.")
        eye = torch.eye(a.weights.hidden, dtype=torch.float64)
        own_a = own_b = cross = eye - 1 / a.weights.hidden
    rows_a, rows_b = ([_part(model, layer, part) for layer in range(model.model.layers)] for model in (a, b))
    lengths_a, lengths_b = ([_lengths(rows, own) for rows in side] for side, own in ((rows_a, own_a), (rows_b, own_b)))
    width = max(map(len, rows_a)) + max(map(len, rows_b))
    best = np.full((len(rows_a), len(rows_b), width), np.nan)
    for i, mine in enumerate(rows_a):
        through = (mine @ cross.to(mine.dtype)) / lengths_a[i][:, None]
        for j, other in enumerate(rows_b):
            found = through @ other.T / lengths_b[j]
            both = torch.cat([found.amax(1), found.amax(0)]).double().cpu().numpy()
            best[i, j, : len(both)] = both
    return Alignment(np.nanmean(best, axis=2), best, part, space)


@paper("embedding-space-transformers")
def translate(
    vectors: torch.Tensor,
    source: HeadedModel | EmbeddingSpace,
    target: HeadedModel | EmbeddingSpace,
    *,
    reads: bool = False,
    tokens: Tokens = None,
) -> torch.Tensor:
    """Vectors of one model's stream as vectors of another's, through the vocabulary they share (section 4.3).

    A state ``x`` says ``x E_1^T`` of the tokens; the state of the other model that says most nearly the same is
    ``x E_1^T (E_2^T)^+ = x K`` with ``K = E_1^T E_2 (E_2^T E_2)^-1``. A vector that reads states by dot product, such
    as a row of a classifier or a change of one by fine-tuning, goes the other way: it becomes the vector that gives a
    state of the target what the old one gives that state's translation.

    Args:
        vectors: ``[..., hidden of source]``: states, or what is added to them.
        source, target: models of one vocabulary (the same token ids).
        reads: the vectors are dotted with states.
        tokens: ids through which to go; None for all.

    Returns:
        ``[..., hidden of target]``.

    Raises:
        InputError: vocabularies of different sizes, or vectors of another width.

    Example:
        >>> model = load("all-MiniLM-L6-v2")
        >>> translate(torch.randn(3, 384), model, model).shape
        torch.Size([3, 384])
    """
    a, b = (model if isinstance(model, EmbeddingSpace) else EmbeddingSpace(model) for model in (source, target))
    if vectors.shape[-1] != a.weights.hidden:
        raise InputError(
            f"Vectors of {vectors.shape[-1]} features were given; '{a.model.name}' has {a.weights.hidden}."
        )
    own_a, own_b, cross = _grams(a, b, "source", tokens, centred=False)
    if reads:  # w' with y . w' = translate(y) . w for the states y of the target
        kernel = torch.linalg.pinv(own_a, hermitian=True) @ cross
    else:
        kernel = cross @ torch.linalg.pinv(own_b, hermitian=True)
    return (vectors.to(kernel.dtype) @ kernel).to(vectors.dtype)


def _grams(
    a: EmbeddingSpace, b: EmbeddingSpace, side: Literal["source", "target"], tokens: Tokens, centred: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``E_1^T E_1``, ``E_2^T E_2`` and ``E_1^T E_2`` in float64, of embeddings whose mean over tokens is taken off.

    For "target" the embedding is the unembedding with the final norm's gain, where the model has one.
    """
    if len(a.embedding) != len(b.embedding) and tokens is None:
        raise InputError(
            f"'{a.model.name}' has {len(a.embedding)} tokens, '{b.model.name}' {len(b.embedding)}: models of one "
            "vocabulary can be compared. Give tokens= ids that mean the same in both."
        )
    first, second = (model.source_rows(tokens) if side == "source" else model.target_rows(tokens) for model in (a, b))
    sums = [
        rows.double().mean(0) if centred else torch.zeros(rows.shape[1], dtype=torch.float64)
        for rows in (first, second)
    ]
    shapes = ((first, first), (second, second), (first, second))
    grams = [torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64) for x, y in shapes]
    for start in range(0, len(first), 16384):
        x, y = (
            rows[start : start + 16384].double().cpu() - mean.cpu()
            for rows, mean in zip((first, second), sums, strict=True)
        )
        for gram, (left, right) in zip(grams, ((x, x), (y, y), (x, y)), strict=True):
            gram += left.T @ right
    if side == "target":  # rows are compared as they are before the final norm: its gain goes into the products
        eyes = [model.before_target(torch.eye(model.weights.hidden, dtype=torch.float64)) for model in (a, b)]
        ends = ((eyes[0], eyes[0]), (eyes[1], eyes[1]), (eyes[0], eyes[1]))
        grams = [left @ gram @ right.T for gram, (left, right) in zip(grams, ends, strict=True)]
    return grams[0], grams[1], grams[2]


def _part(space: EmbeddingSpace, layer: int, part: Part) -> torch.Tensor:
    """Rows ``[n, hidden]`` float32 of a layer's parameters."""
    with torch.no_grad():
        if part == "ffn-values":
            return space.feedforward[layer].values().cpu()
        if part == "ffn-keys":
            return space.feedforward[layer].keys().cpu()
        weights = space.weights.layers[layer]
        if part == "output":
            return weights.output.flatten(0, 1).cpu()
        matrix = {"query": weights.query, "key": weights.key, "value": weights.value}[part]
        return matrix.transpose(1, 2).flatten(0, 1).cpu()


def _lengths(rows: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    wide = rows.double()
    return ((wide @ gram) * wide).sum(1).clamp(min=1e-24).sqrt().to(rows.dtype)
