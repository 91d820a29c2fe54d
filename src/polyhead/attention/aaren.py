"""Aaren: one learned query reads every prefix of the text; softmax as a recurrence, computed by a parallel scan."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.attention.base import Attention, Positions, Triple, repeat_groups
from polyhead.attention.call import AttentionShape, Call, State, check_input
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["AarenAttention", "attention_scan"]


def attention_scan(
    scores: torch.Tensor, values: torch.Tensor, real: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax attention of one query over every prefix, in ``log2(tokens)`` merges.

    Two stretches merge as ``peak = max``, ``total = total_a e^(peak_a - peak) + total_b e^(peak_b - peak)``, and so do
    their sums.

    Args:
        scores: ``[..., tokens]``.
        values: ``[..., tokens, head_dim]``.
        real: ``[..., tokens]`` booleans, False at tokens to leave out; None for all.

    Returns:
        For each prefix its peak and total ``[..., tokens]`` and its sums ``[..., tokens, head_dim]``; sums over total
        is the output.

    Source:
        aaren (Feng et al. 2024, section 3.2, algorithm 1).

    Example:
        >>> peak, total, sums = attention_scan(torch.zeros(3), torch.tensor([[3.0], [1.0], [5.0]]))
        >>> (sums / total[:, None]).flatten().tolist()
        [3.0, 2.0, 3.0]
    """
    lowest = torch.finfo(scores.dtype).min
    peak, total, sums = scores, torch.ones_like(scores), values
    if real is not None:
        peak = peak.masked_fill(~real, lowest)
        total = total * real.to(total.dtype)
        sums = sums * real[..., None].to(sums.dtype)
    reach = 1
    while reach < scores.shape[-1]:
        before = (
            F.pad(peak, (reach, 0), value=lowest)[..., :-reach],
            F.pad(total, (reach, 0))[..., :-reach],
            F.pad(sums, (0, 0, reach, 0))[..., :-reach, :],
        )
        peak, total, sums = merged(before, (peak, total, sums))
        reach *= 2
    return peak, total, sums


def merged(first: Triple, second: Triple) -> Triple:
    """Peak, total and sums of two stretches of text together."""
    peak = torch.maximum(first[0], second[0])
    one, two = (first[0] - peak).exp(), (second[0] - peak).exp()
    return peak, first[1] * one + second[1] * two, first[2] * one[..., None] + second[2] * two[..., None]


@paper("aaren")
class AarenAttention(Attention):
    """``softmax(q . k_1..i) v_1..i`` for every ``i`` with one learned query a layer, shared by all tokens.

    Args:
        shape: widths.
        causal: has to be True.
        positions: has to be None; a query without a place sees no order among the tokens of a prefix.

    Raises:
        InputError: positions.

    Source:
        aaren (Feng et al. 2024, section 3.3).

    Example:
        >>> layer = AarenAttention(AttentionShape(64, 4), causal=True)
        >>> out, state = layer.step(torch.randn(1, 9, 64))
        >>> out.shape, layer.cache_bytes(10_000)
        (torch.Size([1, 9, 64]), 144)
    """

    name: ClassVar[str] = "aaren"
    summary: ClassVar[str] = "One learned query over every prefix, by a parallel scan"
    cost: ClassVar[str] = "tokens"
    both_directions: ClassVar[bool] = False

    def __init__(self, shape: AttentionShape, *, causal: bool = True, positions: Positions | None = None) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        if positions is not None:
            raise InputError(f"Positions {positions} were given; expected None: a learned query stands nowhere.")
        self.query = nn.Parameter(torch.randn(shape.dim) / shape.dim**0.5)

    def project(self, hidden: torch.Tensor) -> Triple:
        """The learned query ``[batch, heads, tokens, head_dim]``, the same everywhere; stock keys and values."""
        q = self.split(self.q_proj(self.query)[None, None])
        return (
            q.expand(hidden.shape[0], -1, hidden.shape[1], -1),
            self.split(self.k_proj(hidden)),
            self.split(self.v_proj(hidden)),
        )

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads ``[batch, heads, tokens, head_dim]`` by a scan."""
        real = None if call.padding is None else call.padding[:, None]
        _, total, sums = self._scan(q, k, v, call, real)
        return sums / torch.where(total == 0, torch.ones_like(total), total)[..., None]

    def weights(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """The weights ``[batch, heads, tokens, tokens]`` that are never formed in a run."""
        return super().weights(q, k, call)

    def step(self, hidden: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """The next tokens; the state is one peak, total and sum a head. See :meth:`Attention.step`."""
        check_input(hidden, None, self.dim)
        state = state or State()
        here = torch.arange(state.seen, state.seen + hidden.shape[1], device=hidden.device)[None]
        call = Call(hidden, here, here, causal=True)
        found = self._scan(*self.project(hidden), call, None)
        if state.tensors:
            found = merged((state.tensors["peak"], state.tensors["total"], state.tensors["sums"]), found)
        heads = found[2] / found[1][..., None]
        kept = {name: each[:, :, -1:].clone() for name, each in zip(("peak", "total", "sums"), found, strict=True)}
        return self.output(heads, call), State(state.seen + hidden.shape[1], kept)

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes of the state, the same for any number of tokens."""
        assert self.shape is not None
        return self.shape.heads * (self.shape.size + 2) * itemsize

    def _scan(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call, real: torch.Tensor | None) -> Triple:
        k, v = repeat_groups(k, q.shape[1]), repeat_groups(v, q.shape[1])
        scores = (q * k).sum(-1) * self.scale(q, call)
        return attention_scan(scores, v, real)
