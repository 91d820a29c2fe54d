"""Linear attention with a decay a head and no denominator, computed in blocks: constant time a token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.attention.base import Positions
from polyhead.attention.call import AttentionShape, Call
from polyhead.attention.linear import LinearAttention
from polyhead.attention.transnormer import token_rms
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["LightningAttention", "head_decays"]


def head_decays(heads: int, depth: float = 0.0) -> list[float]:
    """Decay of each head, ``exp(-8 h / heads * (1 - depth))``, ``h`` from 0: the first head forgets nothing.

    Args:
        heads: how many.
        depth: layer over layers, from 0 (the first) to 1; deeper layers forget less.

    Raises:
        InputError: a depth outside 0 to 1.

    Example:
        >>> [round(rate, 3) for rate in head_decays(4)]
        [1.0, 0.135, 0.018, 0.002]
    """
    if not 0 <= depth <= 1:
        raise InputError(f"A depth of {depth} was given; expected layer / layers, from 0 to 1.")
    return [math.exp(-8 * head / heads * (1 - depth)) for head in range(heads)]


@paper("lightning-attention")
class LightningAttention(LinearAttention):
    """``rms(sum_{j <= i} decay^(i-j) (silu(q_i) . silu(k_j)) v_j) * u_i``: a decay a head, a norm in place of a sum.

    A block of tokens is one small masked product; blocks before it come in through one ``[head_dim, head_dim]`` state.

    Args:
        shape: widths.
        causal: has to be True.
        positions: tells queries and keys where they stand (the paper: in the first layer only).
        rates: decay of each head in (0, 1]; None for :func:`head_decays`.
        depth: layer over layers, where ``rates`` is None.
        gate: whether heads are multiplied by ``u = W_u x``, as in the paper's model.
        block: tokens of a block; changes time, not values.

    Raises:
        InputError: rates of another count or outside (0, 1].

    Source:
        lightning-attention (Qin et al. 2024, section 3 and algorithm 1; the model around it, section 3.3).

    Example:
        >>> layer = LightningAttention(AttentionShape(64, 4), causal=True)
        >>> layer(torch.randn(1, 9, 64)).shape, layer.cache_bytes(10_000)
        (torch.Size([1, 9, 64]), 2048)
    """

    name: ClassVar[str] = "lightning-attention"
    summary: ClassVar[str] = "Linear attention in blocks with a decay a head and a norm in place of a denominator"
    both_directions: ClassVar[bool] = False
    normalize: ClassVar[bool] = False
    rates: torch.Tensor

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = True,
        positions: Positions | None = None,
        rates: Sequence[float] | None = None,
        depth: float = 0.0,
        gate: bool = True,
        block: int = 64,
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        chosen = head_decays(shape.heads, depth) if rates is None else list(rates)
        if len(chosen) != shape.heads or not all(0 < rate <= 1 for rate in chosen):
            raise InputError(f"Rates {chosen} were given; expected {shape.heads} numbers above 0 and up to 1.")
        self.register_buffer("rates", torch.tensor(chosen))
        self.u_proj = nn.Linear(shape.dim, shape.width, bias=shape.bias) if gate else None
        self.block = block

    def features(self, states: torch.Tensor, role: str) -> torch.Tensor:
        """``silu`` of queries and keys."""
        return F.silu(states)

    def decay(self) -> torch.Tensor:
        """``[heads]``."""
        return self.rates

    def finish(self, heads: torch.Tensor) -> torch.Tensor:
        """Heads of a token over their common root mean square."""
        return token_rms(heads)

    def output(self, heads: torch.Tensor, call: Call) -> torch.Tensor:
        """Gated heads through the output projection."""
        merged = heads.transpose(1, 2).flatten(2)
        return self.o_proj(merged if self.u_proj is None else merged * self.u_proj(call.hidden))
