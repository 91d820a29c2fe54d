"""Mixture of attention heads: many query heads as experts, a few of them for each token, one set of keys and values."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from polyhead.attention.base import Attention, LayerMatrices, Positions, Triple
from polyhead.attention.call import AttentionShape, Call, check_input
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["MixtureOfAttentionHeads", "expert_use", "token_expert_pmi"]


@paper("moa-heads")
class MixtureOfAttentionHeads(Attention):
    """Each token attends with the ``shape.heads`` experts its router likes best; keys and values are the same for all.

    ``out = sum w_i E_i`` with ``w_i = p_i / stopgrad(sum of chosen p)``. An expert is a query and an output matrix.
    Attention is paid for the chosen heads alone; the two matrices are applied for all experts.
    ``balance_loss`` is ``balance * E sum_i f_i P_i + flat * mean(logsumexp(router logits)^2)``.

    Args:
        shape: widths; ``heads`` is how many experts a token uses, ``head_dim`` their size; one key-value head.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        experts: how many there are; None for four times the heads.
        balance: weight of the load balance in ``balance_loss``.
        flat: weight of the router's z-loss in it.

    Raises:
        InputError: fewer experts than heads.

    Source:
        moa-heads (Zhang et al. 2022).

    Example:
        >>> import torch
        >>> layer = MixtureOfAttentionHeads(AttentionShape(64, 4), experts=16)
        >>> out = layer(torch.randn(2, 5, 64))
        >>> out.shape, layer.router(torch.randn(2, 5, 64)).shape
        (torch.Size([2, 5, 64]), torch.Size([2, 5, 16]))
    """

    name: ClassVar[str] = "moa-heads"
    summary: ClassVar[str] = "Query heads as experts, a few a token, over one set of keys and values"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        experts: int | None = None,
        balance: float = 0.01,
        flat: float = 0.001,
    ) -> None:
        self.experts = 4 * shape.heads if experts is None else experts
        if self.experts < shape.heads:
            raise InputError(
                f"{self.experts} experts for {shape.heads} heads a token were given; expected as many or more."
            )
        one = AttentionShape(shape.dim, shape.heads, 1, shape.size, shape.bias)
        super().__init__(one, causal=causal, positions=positions)
        self.balance = balance
        self.flat = flat

    def make_projections(self, shape: AttentionShape) -> None:
        """Queries and outputs of all experts, one key, one value, and the router."""
        super().make_projections(shape)
        self.q_proj = nn.Linear(shape.dim, self.experts * shape.size, bias=shape.bias)
        self.o_proj = nn.Linear(self.experts * shape.size, shape.dim, bias=shape.bias)
        self.route = nn.Linear(shape.dim, self.experts, bias=False)

    def router(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, experts]`` probabilities of ``[batch, tokens, dim]``."""
        return torch.softmax(self.route(hidden), -1)

    def project(self, hidden: torch.Tensor) -> Triple:
        """Queries of each token's chosen experts, and the keys and values of all."""
        q = self.split(self.q_proj(hidden))
        chosen = self._chosen(hidden).transpose(1, 2)[..., None]
        return (
            q.gather(1, chosen.expand(-1, -1, -1, q.shape[3])),
            self.split(self.k_proj(hidden)),
            self.split(self.v_proj(hidden)),
        )

    def output(self, heads: torch.Tensor, call: Call) -> torch.Tensor:
        """Chosen heads times their weights, through their experts' output matrices."""
        probabilities, chosen = self.router(call.hidden), self._chosen(call.hidden)
        kept = probabilities.gather(-1, chosen)
        weighed = heads.transpose(1, 2) * (kept / kept.sum(-1, keepdim=True).detach())[..., None].to(heads.dtype)
        places = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0)
        self.balance_loss = self._balance(self.route(call.hidden), probabilities, places, call.padding)
        spread = weighed.new_zeros(*probabilities.shape, weighed.shape[3])
        spread = spread.scatter(2, chosen[..., None].expand_as(weighed), weighed)
        return self.o_proj(spread.flatten(2))

    @classmethod
    def from_mha(cls, layer: LayerMatrices, **knobs: object) -> Attention:
        """Refused: experts share one key and one value head, which a trained layer does not have.

        Raises:
            InputError: always.
        """
        raise InputError(f"{cls.__name__} was to start from a trained layer; its heads share one key: train it anew.")

    def _chosen(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.shape is not None
        return self.route(hidden).topk(self.shape.heads, -1).indices

    def _balance(
        self, logits: torch.Tensor, probabilities: torch.Tensor, places: torch.Tensor, padding: torch.Tensor | None
    ) -> torch.Tensor:
        real = torch.ones_like(logits[..., :1]) if padding is None else padding[..., None].to(logits.dtype)
        count = real.sum().clamp_min(1)
        used = (places * real).sum((0, 1)) / (places * real).sum().clamp_min(1)
        wanted = (probabilities * real).sum((0, 1)) / count
        flat = (logits.logsumexp(-1, keepdim=True).square() * real).sum() / count
        return self.balance * self.experts * (used * wanted).sum() + self.flat * flat


@torch.no_grad()
def expert_use(
    layer: MixtureOfAttentionHeads, hidden: torch.Tensor, padding: torch.Tensor | None = None
) -> torch.Tensor:
    """``[experts]`` share of all choices that fell on each expert, over real tokens of ``[batch, tokens, dim]``.

    Example:
        >>> layer = MixtureOfAttentionHeads(AttentionShape(64, 4), experts=16)
        >>> round(expert_use(layer, torch.randn(2, 5, 64)).sum().item(), 4)
        1.0
    """
    counts = _choices(layer, hidden, padding)[0].sum(0)
    return counts / counts.sum()


@torch.no_grad()
def token_expert_pmi(
    layer: MixtureOfAttentionHeads, hidden: torch.Tensor, ids: torch.Tensor, padding: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts the occurrences of a token choose: ``log2(p(token, expert) / (p(token) p(expert)))``.

    Args:
        layer: the layer.
        hidden: ``[batch, tokens, dim]`` states that enter it.
        ids: ``[batch, tokens]`` what stands there.
        padding: True at real tokens.

    Returns:
        The ids found, ``[kinds]``, and ``[kinds, experts]`` bits; minus infinity where never chosen, 0 for experts
        that nobody chose.

    Raises:
        InputError: ids of another shape.
    """
    if ids.shape != hidden.shape[:2]:
        raise InputError(f"Ids {list(ids.shape)} were given; expected {list(hidden.shape[:2])}, one a token.")
    chosen, real = _choices(layer, hidden, padding)
    kinds, of_token = ids[real].unique(return_inverse=True)
    joint = chosen.new_zeros(len(kinds), layer.experts).index_add(0, of_token, chosen)
    joint = joint / joint.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return kinds, torch.where(apart > 0, (joint / apart.clamp_min(1e-300)).log2(), 0.0)


def _choices(
    layer: MixtureOfAttentionHeads, hidden: torch.Tensor, padding: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[real tokens, experts]`` ones at each token's experts, and where real tokens are."""
    check_input(hidden, padding, layer.dim)
    real = torch.ones_like(hidden[..., 0], dtype=torch.bool) if padding is None else padding
    assert layer.shape is not None
    best = layer.router(hidden[real]).topk(layer.shape.heads, -1).indices
    ones = torch.zeros(len(best), layer.experts, dtype=torch.float64, device=best.device).scatter(1, best, 1.0)
    return ones, real
