"""InLine attention: linear attention normalised by subtraction, so that the length of a query counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.attention.base import Positions
from polyhead.attention.call import AttentionShape, Call, State
from polyhead.attention.linear import LinearAttention, causal_linear
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["InLineAttention"]


@paper("inline-attention")
class InLineAttention(LinearAttention):
    """Weights ``(1 + s phi(q_i) . (phi(k_j) - mean_j phi(k_j))) / n``: rows sum to 1, and a longer query looks sharper.

    ``n`` counts the tokens seen. The causal form, with the mean over the tokens so far, is ours.

    Args:
        shape: widths.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        kernel: ``phi``; None for the identity, as in the authors' code.
        local: whether each value's neighbours are added, with weights that two layers a head make of the mean token.
        grid: rows and columns of the tokens, where neighbours are 3x3; None for a line, where they are three.

    Raises:
        InputError: ``local`` of a causal layer (the mean token is not known yet), a grid without ``local``.

    Source:
        inline-attention (Han et al. 2024, equations 6 to 9).

    Example:
        >>> layer = InLineAttention(AttentionShape(64, 4), local=True, grid=(3, 3))
        >>> layer(torch.randn(1, 9, 64)).shape
        torch.Size([1, 9, 64])
    """

    name: ClassVar[str] = "inline-attention"
    summary: ClassVar[str] = "Linear attention normalised by subtraction"
    normalize: ClassVar[bool] = False

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        kernel: Callable[[torch.Tensor], torch.Tensor] | None = None,
        local: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        if local and causal:
            raise InputError("local=True with causal=True was given; its weights come from all tokens. Leave one out.")
        if grid is not None and not local:
            raise InputError(f"A grid {grid} without local=True was given; only the neighbours need one.")
        self.kernel, self.grid = kernel, grid
        taps = 3 if grid is None else 9
        self.local: nn.Module | None = None
        if local:
            self.local = nn.Sequential(
                nn.Conv1d(shape.width, shape.width, 1, groups=shape.heads),
                nn.GELU(),
                nn.Conv1d(shape.width, shape.width * taps, 1, groups=shape.heads),
            )

    def features(self, states: torch.Tensor, role: str) -> torch.Tensor:
        """``kernel`` of the states."""
        return states if self.kernel is None else self.kernel(states)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads ``[batch, heads, tokens, head_dim]`` in time that grows with tokens."""
        if call.mask is not None:
            raise InputError(f"{type(self).__name__} was given a mask of its own; it knows padding and causal only.")
        q, k, v = self._ready(q * self.scale(q, call), k, v, call)
        seen = torch.ones_like(v[..., :1])
        if call.padding is not None:
            seen = seen * call.padding[:, None, :, None].to(v.dtype)
        v = v * seen
        wide = torch.cat([v, seen], -1)
        if call.causal:
            return _subtracted(causal_linear(q, k, wide, None, self.block)[0], wide.cumsum(2))
        heads = _subtracted(q @ (k.transpose(2, 3) @ wide), wide.sum(2, keepdim=True))
        return heads if self.local is None else heads + self._neighbours(v, call)

    def weights(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Weights ``[batch, heads, tokens, tokens]``, some below zero; neighbours added by ``local`` not among them."""
        q, k, _ = self._ready(q * self.scale(q, call), k, k, call)
        allowed = call.allowed()
        logits = q @ k.transpose(2, 3)
        seen = torch.ones_like(logits) if allowed is None else allowed.to(logits.dtype).expand_as(logits)
        count = seen.sum(-1, keepdim=True).clamp_min(1)
        return seen * (1 + logits - (logits * seen).sum(-1, keepdim=True) / count) / count

    def step(self, hidden: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """The next tokens; the state has one size for any number of tokens seen. See :meth:`Attention.step`."""
        q, k, v, call, state = self._begin_step(hidden, state)
        q, k, v = self._ready(q * self.scale(q, call), k, v, call)
        wide = F.pad(v, (0, 1), value=1.0)
        mixed, products = causal_linear(q, k, wide, None, self.block)
        sums = wide.cumsum(2)
        if state.tensors:
            mixed = mixed + q @ state.tensors["products"]
            sums = sums + state.tensors["sums"]
            products = products + state.tensors["products"]
        kept = {"products": products, "sums": sums[:, :, -1:].clone()}
        return self.output(_subtracted(mixed, sums), call), State(state.seen + hidden.shape[1], kept)

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes of the state, the same for any number of tokens."""
        assert self.shape is not None
        return self.shape.heads * (self.feature_count() + 1) * (self.shape.size + 1) * itemsize

    def _neighbours(self, v: torch.Tensor, call: Call) -> torch.Tensor:
        assert self.local is not None
        batch, heads, tokens, size = v.shape
        hidden = call.hidden
        if call.padding is None:
            mean = hidden.mean(1)
        else:
            mean = hidden.sum(1) / call.padding.sum(1, keepdim=True).clamp_min(1).to(hidden.dtype)
        taps = self.local(self._heads_width(mean)[..., None]).view(batch * heads * size, 1, -1)
        flat = v.transpose(2, 3).reshape(1, batch * heads * size, tokens)
        if self.grid is None:
            near = F.conv1d(flat, taps, padding=1, groups=batch * heads * size)
        else:
            if tokens != self.grid[0] * self.grid[1]:
                raise InputError(f"{tokens} tokens were given; expected a grid of {self.grid[0]} x {self.grid[1]}.")
            filters = taps.unflatten(2, (3, 3))
            near = F.conv2d(flat.unflatten(2, self.grid), filters, padding=1, groups=len(filters)).flatten(2)
        return near.view(batch, heads, size, tokens).transpose(2, 3)

    def _heads_width(self, mean: torch.Tensor) -> torch.Tensor:
        assert self.shape is not None
        if self.shape.width != self.shape.dim:
            raise InputError(
                f"Heads of {self.shape.width} features on tokens of {self.shape.dim} were given; local=True expects "
                "the two to be equal, for the mean token is split over the heads."
            )
        return mean


def _subtracted(mixed: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """``(q S + (1 - q z / n) V) / n`` of ``[q S, q z]`` and ``[V, n]``."""
    count = sums[..., -1:].clamp_min(1)
    return (mixed[..., :-1] + (1 - mixed[..., -1:] / count) * sums[..., :-1]) / count
