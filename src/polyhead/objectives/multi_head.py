"""Several projections, and for each pair a temperature of its own in each of them (paper amcl)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.objectives.base import Loss, relation_of
from polyhead.objectives.infonce import InfoNCE
from polyhead.objectives.relation import Relation
from polyhead.objectives.similarity import CosineSimilarity
from polyhead.papers import paper

__all__ = ["AdaptiveTemperature", "MultiHeadObjective", "MultiHeadProjector"]


@paper("amcl")
class MultiHeadProjector(nn.Module):
    """Several small networks on one vector, each a view of its own.

    Args:
        in_dim: of the vectors.
        out_dim: of each projection.
        heads: how many.
        hidden: width of each network's hidden layer; None: ``in_dim``.
        seed: of their start.

    Example:
        >>> import torch
        >>> from polyhead.objectives import MultiHeadProjector
        >>> MultiHeadProjector(16, 8, heads=3)(torch.randn(5, 16)).shape
        torch.Size([5, 3, 8])
    """

    def __init__(self, in_dim: int, out_dim: int, heads: int = 3, *, hidden: int | None = None, seed: int = 0) -> None:
        super().__init__()
        hidden = in_dim if hidden is None else hidden
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(heads, in_dim, hidden, generator=generator) * (2 / in_dim) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(heads, hidden))
        self.second = nn.Parameter(torch.randn(heads, hidden, out_dim, generator=generator) / hidden**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, heads, out_dim]`` of ``[n, in_dim]``."""
        inner = (torch.einsum("nd,hdk->nhk", x, self.first) + self.bias).relu()
        return torch.einsum("nhk,hko->nho", inner, self.second)


@paper("amcl")
class AdaptiveTemperature(nn.Module):
    """``tau_h(i, j) = low + (high - low) sigmoid(net_h(s_h(i, j)))``: a temperature for every pair and head.

    The network of a head is a hidden layer of tanh on the pair's similarity. What the paper feeds it was not certain
    from its text; the similarity is the least that can tell pairs apart.

    Args:
        heads: how many.
        low, high: range of temperatures.
        hidden: width.
        start: temperature of every pair before training.
        seed: of its start.
    """

    def __init__(
        self,
        heads: int,
        *,
        low: float = 0.01,
        high: float = 2.0,
        hidden: int = 8,
        start: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 < low < start < high:
            raise InputError(f"low {low}, start {start}, high {high}: expected 0 < low < start < high.")
        self.low = low
        self.high = high
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(torch.randn(heads, hidden, generator=generator))
        self.bias = nn.Parameter(torch.zeros(heads, hidden))
        self.second = nn.Parameter(torch.zeros(heads, hidden))
        share = (start - low) / (high - low)
        self.shift = nn.Parameter(torch.full((heads,), float(torch.tensor(share).logit())))

    def forward(self, similarity: Tensor) -> Tensor:
        """Temperatures ``[heads, n, m]`` of similarities of the same shape."""
        inner = torch.tanh(similarity.unsqueeze(-1) * self.first[:, None, None] + self.bias[:, None, None])
        scores = (inner * self.second[:, None, None]).sum(-1) + self.shift[:, None, None]
        return self.low + (self.high - self.low) * scores.sigmoid()


@paper("amcl")
class MultiHeadObjective(nn.Module):
    """``sum_h loss(s_h / tau_h) + beta * mean(d / 2 log tau_h + 1 / tau_h)`` over the heads of multi-head embeddings.

    The second part, over all pairs that count, keeps temperatures from vanishing and from growing without end: alone
    it is lowest at ``tau = 2 / d``.

    Args:
        heads: of the embeddings.
        temperature: a network; None: every pair has ``fixed``.
        beta: weight of the second part.
        loss: any, of similarities already divided by temperatures; None: ``InfoNCE(temperature=1)``.
        fixed: temperature where there is no network.

    Example:
        >>> import torch
        >>> from polyhead.objectives import AdaptiveTemperature, MultiHeadObjective, MultiHeadProjector
        >>> projector, objective = MultiHeadProjector(16, 8, 3), MultiHeadObjective(3, AdaptiveTemperature(3))
        >>> objective(projector(torch.randn(5, 16)), other=projector(torch.randn(5, 16))).ndim
        0
    """

    def __init__(
        self,
        heads: int,
        temperature: AdaptiveTemperature | None = None,
        *,
        beta: float = 0.1,
        loss: Loss | None = None,
        fixed: float = 0.2,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = temperature
        self.beta = beta
        self.loss = InfoNCE(temperature=1.0) if loss is None else loss
        self.fixed = fixed
        self.similarity = CosineSimilarity()

    def forward(
        self, embeddings: Tensor, relation: Relation | Tensor | None = None, other: Tensor | None = None
    ) -> Tensor:
        """A scalar.

        Args:
            embeddings: ``[n, heads, d]``.
            relation: as :class:`polyhead.objectives.Objective` takes it, without graded pairs.
            other: ``[m, heads, d]``; None: each other.
        """
        if embeddings.ndim != 3 or embeddings.shape[1] != self.heads:
            raise InputError(f"Expected embeddings [n, {self.heads}, d], got {list(embeddings.shape)}.")
        relation = relation_of(embeddings, relation, other)
        similarity = self.similarity(embeddings.movedim(1, 0), None if other is None else other.movedim(1, 0))
        if self.temperature is None:
            return torch.stack([self.loss(one / self.fixed, relation) for one in similarity]).sum()
        tau = self.temperature(similarity)
        total = torch.stack([self.loss(one / t, relation) for one, t in zip(similarity, tau, strict=True)]).sum()
        counted = (relation.is_positive | relation.is_negative).expand_as(tau)
        rest = embeddings.shape[-1] / 2 * tau.log() + 1 / tau
        return total + self.beta * rest[counted].mean() * self.heads
