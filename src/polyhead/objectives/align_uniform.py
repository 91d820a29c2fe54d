"""Alignment and uniformity on the sphere: measures, and a loss without softmax (paper align-uniform)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.objectives.base import Loss, Terms, weighted_logsumexp
from polyhead.objectives.relation import Relation
from polyhead.objectives.similarity import Similarity, squared_distance
from polyhead.objectives.triplet import SquaredUnitEuclidean
from polyhead.papers import paper

__all__ = ["AlignUniformLoss", "alignment", "head_alignment_uniformity", "uniformity"]


@paper("align-uniform")
def alignment(x: Tensor, y: Tensor, *, alpha: float = 2.0) -> Tensor:
    """Mean ``|x_i - y_i|^alpha`` of positive pairs on the unit sphere; 0 where the two of each pair fall together.

    Args:
        x, y: ``[n, d]``, normalised here.
    """
    x, y = nn.functional.normalize(x, dim=-1), nn.functional.normalize(y, dim=-1)
    return (x - y).norm(dim=-1).pow(alpha).mean()


@paper("align-uniform")
def uniformity(x: Tensor, *, t: float = 2.0, chunk: int = 4096) -> Tensor:
    """``log mean exp(-t |x_i - x_j|^2)`` over pairs of different vectors on the unit sphere; 0 at collapse.

    Args:
        x: ``[n, d]``, normalised here, at least 2.
        chunk: rows compared at once.

    Example:
        >>> import torch
        >>> from polyhead.objectives import uniformity
        >>> round(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])).item(), 4)
        -8.0
    """
    if len(x) < 2:
        raise InputError(f"Uniformity is of pairs: expected at least 2 vectors, got {len(x)}.")
    x = nn.functional.normalize(x, dim=-1)
    parts = []
    for start in range(0, len(x), chunk):
        exponent = -t * squared_distance(x[start : start + chunk], x)
        own = torch.arange(len(exponent), device=x.device)
        exponent = exponent.masked_fill(nn.functional.one_hot(own + start, len(x)).bool(), -torch.inf)
        parts.append(exponent.logsumexp(1))
    n = len(x)
    return torch.cat(parts).logsumexp(0) - float(np.log(n * (n - 1)))


@paper("align-uniform")
class AlignUniformLoss(Loss):
    """``align * mean_pos d^(alpha/2) + uniform * log mean_neg e^(-t d)`` with ``d`` the squared distance on the sphere.

    Uniformity is taken over the negatives, pairs drawn apart from each other. Two views of ``n`` things go in as one
    batch of ``2n`` with labels ``0..n-1, 0..n-1``.

    Args:
        align, uniform: weights of the two.
        alpha, t: the paper's exponents.
    """

    similarity: ClassVar[type[Similarity]] = SquaredUnitEuclidean

    def __init__(self, *, align: float = 1.0, uniform: float = 1.0, alpha: float = 2.0, t: float = 2.0) -> None:
        super().__init__()
        self.align = align
        self.uniform = uniform
        self.alpha = alpha
        self.t = t

    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """See :class:`Loss`."""
        # The tiny floor keeps the gradient of d^(1/2) finite where two vectors are the same.
        distance = (-similarity).clamp(min=1e-12) if self.alpha < 2 else -similarity
        total = relation.negative.to(similarity.dtype).sum()
        flat = weighted_logsumexp(self.t * similarity.reshape(1, -1), relation.negative.reshape(1, -1))
        spread = torch.where(total > 0, flat - total.clamp(min=1e-12).log(), torch.zeros_like(flat))
        return [
            Terms(self.align * distance.clamp(min=0) ** (self.alpha / 2), relation.positive),
            Terms(self.uniform * spread, torch.ones_like(spread)),
        ]


@paper("align-uniform")
def head_alignment_uniformity(
    x: Tensor, y: Tensor, *, model: str = "", data: str = "", alpha: float = 2.0, t: float = 2.0
) -> tuple[HeadMap, HeadMap]:
    """Both measures for the vectors of every head.

    Args:
        x, y: ``[n, layers, heads, d]`` pooled head outputs of the two texts of each positive pair.
        model, data: names for the maps.

    Returns:
        Alignment and uniformity, ``[layers, heads]`` each; lower is better in both.
    """
    if x.ndim != 4 or x.shape != y.shape:
        raise InputError(f"Expected two tensors [n, layers, heads, d], got {tuple(x.shape)} and {tuple(y.shape)}.")
    layers, heads = x.shape[1:3]
    close, spread = np.zeros((layers, heads)), np.zeros((layers, heads))
    with torch.no_grad():
        for layer in range(layers):
            for head in range(heads):
                first, second = x[:, layer, head].float(), y[:, layer, head].float()
                close[layer, head] = float(alignment(first, second, alpha=alpha))
                spread[layer, head] = float(uniformity(first, t=t))
    return (
        HeadMap(close, name="alignment", model=model, data=data, higher_means="pairs lie farther apart"),
        HeadMap(spread, name="uniformity", model=model, data=data, higher_means="vectors lie closer together"),
    )
