"""Mixture of heads: a router opens some of the heads for each token."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.attention.base import Attention, Positions
from polyhead.attention.call import AttentionShape, Call
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["MixtureOfHeads"]


@paper("moh")
class MixtureOfHeads(Attention):
    """``sum_i g_i H_i W_i``: the first heads always, of the others the ``top_k`` that a token's router scores highest.

    Shared heads have ``g = a_1 softmax(W_s x)``, routed ones ``a_2 softmax(W_r x)`` where chosen and 0 elsewhere, with
    ``[a_1, a_2] = softmax(W_h x)``. ``balance_loss`` is ``sum_i P_i f_i`` over routed heads: mean router probability
    times share of tokens that choose the head (the paper weighs it by 0.01).

    Args:
        shape: widths.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        shared: heads that are always open; None for a quarter.
        top_k: routed heads open for a token; None for so many that three quarters of all heads are open.
        router: "linear", or "query-norm" to convert trained layers: the heads with the longest queries are opened,
            gates are 1 or 0, and gradients pass as if they were the softmax of the lengths.
        scaled: gates as the authors' code has them, 1 on average: times the shared heads, the routed ones divided by
            their sum and times ``top_k``, ``a_1`` and ``a_2`` doubled. The equations' gates shrink what a layer adds.

    Raises:
        InputError: counts that do not fit the heads, another router, scaled gates of a router that has none.

    Source:
        moh (Jin et al. 2024).

    Example:
        >>> import torch
        >>> layer = MixtureOfHeads(AttentionShape(64, 8), shared=2, top_k=2)
        >>> gates = layer.gates(torch.randn(1, 5, 64))
        >>> gates.shape, int((gates[0, 0] > 0).sum())
        (torch.Size([1, 5, 8]), 4)
    """

    name: ClassVar[str] = "moh"
    summary: ClassVar[str] = "A router opens some heads for each token, others are always open"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        shared: int | None = None,
        top_k: int | None = None,
        router: Literal["linear", "query-norm"] = "linear",
        scaled: bool = False,
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        self.shared = shape.heads // 4 if shared is None else shared
        routed = shape.heads - self.shared
        self.top_k = max(1, round(0.75 * shape.heads) - self.shared) if top_k is None else top_k
        if not 0 <= self.shared < shape.heads or not 1 <= self.top_k <= routed:
            raise InputError(
                f"shared={self.shared} and top_k={self.top_k} of {shape.heads} heads were given; expected shared "
                "below the heads, and top_k from 1 to those left."
            )
        if router not in ("linear", "query-norm"):
            raise InputError(f"router={router!r} was given; expected 'linear' or 'query-norm'.")
        if scaled and router != "linear":
            raise InputError("scaled=True with router='query-norm' was given; expected router='linear': others are 1.")
        self.router = router
        self.scaled = scaled
        if router == "linear":
            self.route = nn.Linear(shape.dim, routed, bias=False)
            if self.shared:
                self.share = nn.Linear(shape.dim, self.shared, bias=False)
                self.groups = nn.Linear(shape.dim, 2, bias=False)

    def gates(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, heads]`` how far each head is open for each token ``[batch, tokens, dim]``."""
        return self._gates(self._routed(hidden), hidden)

    def output(self, heads: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads times their gates, projected."""
        probabilities = self._routed(call.hidden)
        gates = self._gates(probabilities, call.hidden)
        self.balance_loss = self._balance(probabilities, gates, call.padding)
        return super().output(heads * gates.transpose(1, 2)[..., None].to(heads.dtype), call)

    def _routed(self, hidden: torch.Tensor) -> torch.Tensor:
        if self.router == "linear":
            return torch.softmax(self.route(hidden), -1)
        return self.split(self.q_proj(hidden)).norm(dim=-1).transpose(1, 2)[..., self.shared :].softmax(-1)

    def _gates(self, routed: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        chosen = torch.zeros_like(routed).scatter(-1, routed.topk(self.top_k, -1).indices, 1.0)
        if self.router == "query-norm":
            return F.pad(chosen + chosen * (routed - routed.detach()), (self.shared, 0), value=1.0)
        routed = routed * chosen
        if self.scaled:
            routed = routed * (self.top_k / routed.sum(-1, keepdim=True))
        if not self.shared:
            return routed
        ratio, always = self.groups(hidden).softmax(-1), self.share(hidden).softmax(-1)
        if self.scaled:
            ratio, always = 2 * ratio, self.shared * always
        return torch.cat([ratio[..., :1] * always, ratio[..., 1:] * routed], -1)

    def _balance(self, routed: torch.Tensor, gates: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        chosen = (gates[..., self.shared :] > 0).to(routed.dtype)
        if padding is None:
            return (routed.mean((0, 1)) * chosen.mean((0, 1))).sum()
        real = padding[..., None].to(routed.dtype)
        count = real.sum().clamp_min(1)
        return ((routed * real).sum((0, 1)) / count * ((chosen * real).sum((0, 1)) / count)).sum()
