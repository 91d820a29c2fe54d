"""MHLA: linear attention with one summary a block of tokens, of which every block of queries reads its own blend."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.attention.base import Positions
from polyhead.attention.call import AttentionShape, Call, State
from polyhead.attention.linear import LinearAttention
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["TokenLevelMultiHeadLinearAttention", "block_blend"]

Start = Literal["cos", "linear", "exp", "local", "even"]


def block_blend(blocks: int, start: Start = "cos") -> torch.Tensor:
    """``[blocks, blocks]`` blend of summaries by how far apart blocks stand, columns summing to 1.

    Args:
        blocks: how many.
        start: falls with distance as a quarter of a cosine, a line or ``exp``; "local": one and its direct
            neighbours; "even": all the same, which is plain linear attention.

    Raises:
        InputError: another start.

    Example:
        >>> block_blend(2, "even").tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    apart = (torch.arange(blocks)[:, None] - torch.arange(blocks)[None, :]).abs().float()
    shapes = {
        "cos": (apart / blocks * math.pi / 2).cos(),
        "linear": 1 - apart / blocks,
        "exp": (-apart).exp(),
        "local": (apart <= 1).float(),
        "even": torch.ones_like(apart),
    }
    if start not in shapes:
        raise InputError(f"A start {start!r} was given; expected one of {', '.join(shapes)}.")
    return shapes[start] / shapes[start].sum(0)


@paper("mhla")
class TokenLevelMultiHeadLinearAttention(LinearAttention):
    """``phi(q) S_a / (phi(q) z_a)`` with ``S_a = sum_b m_ab sum_{j in b} phi(k_j) v_j^T`` for queries of block ``a``.

    ``z`` is blended alike; ``phi = relu + eps``. Causal layers read the blocks before and their own up to the query.

    Args:
        shape: widths.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        blocks: blocks of tokens, the paper's token-level heads; 1 is plain linear attention.
        block_size: tokens of a block, where all beyond the last one belong to it; None for a text split evenly
            (64 in causal layers, which do not know its length).
        start: what the blend starts from, see :func:`block_blend`.
        eps: added to the features.

    Raises:
        InputError: counts below 1.

    Source:
        mhla (2026, section 4). The normaliser is that of the definition: every row of weights sums to 1.

    Example:
        >>> layer = TokenLevelMultiHeadLinearAttention(AttentionShape(64, 4), blocks=3)
        >>> weights = layer.attention_weights(torch.randn(1, 9, 64))
        >>> weights.shape, round(weights[0, 0, 0].sum().item(), 3)
        (torch.Size([1, 4, 9, 9]), 1.0)
    """

    name: ClassVar[str] = "mhla"
    summary: ClassVar[str] = "Linear attention with a blended summary a block of tokens"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        blocks: int = 16,
        block_size: int | None = None,
        start: Start = "cos",
        eps: float = 1e-6,
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        if blocks < 1 or (block_size is not None and block_size < 1):
            raise InputError(f"{blocks} blocks of {block_size} tokens were given; expected counts of at least 1.")
        self.blocks, self.eps = blocks, eps
        self.block_size = 64 if causal and block_size is None else block_size
        self.blend = nn.Parameter(block_blend(blocks, start))

    def features(self, states: torch.Tensor, role: str) -> torch.Tensor:
        """``relu + eps``."""
        return F.relu(states) + self.eps

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads ``[batch, heads, tokens, head_dim]``."""
        if call.mask is not None:
            raise InputError(f"{type(self).__name__} was given a mask of its own; it knows padding and causal only.")
        q, k, v = self._ready(q, k, v, call)
        tokens, order = q.shape[2], None
        if call.padding is not None:
            order = (~call.padding).long().argsort(stable=True, dim=1)
            q, k, v = (_taken(each, order) for each in (q, k, v))
        sizes = self._sizes(call, tokens)
        longest = self.block_size or -(-tokens // self.blocks)
        chunks = -(-tokens // longest) if self.block_size else self.blocks
        slots = torch.arange(longest, device=q.device)
        index = torch.arange(chunks, device=q.device)[None, :, None] * sizes[:, None, None] + slots
        real = (slots < sizes[:, None, None]) & (index < tokens)
        index = index.clamp_max(tokens - 1).flatten(1)
        q, k, v = (_taken(each, index).unflatten(2, (chunks, longest)) for each in (q, k, v))
        mixed = self._blended(q, k * real[:, None, :, :, None].to(k.dtype), v, call.causal)[0].flatten(2, 3)
        place = torch.arange(tokens, device=q.device)
        mixed = _taken(
            mixed, (place // sizes[:, None] * longest + place % sizes[:, None]).clamp_max(mixed.shape[2] - 1)
        )
        return self._divided(mixed if order is None else _taken(mixed, order.argsort(1)))

    def weights(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """The weights ``[batch, heads, tokens, tokens]`` that are never formed in a run."""
        q, k, _ = self._ready(q, k, k, call)
        block = (call.k_positions // self._sizes(call, q.shape[2])[:, None]).clamp_max(self.blocks - 1)
        dense = (q @ k.transpose(2, 3)) * self.blend[block[:, :, None], block[:, None, :]][:, None].to(q.dtype)
        allowed = call.allowed()
        dense = dense if allowed is None else dense.masked_fill(~allowed, 0.0)
        return dense / dense.sum(-1, keepdim=True)

    def step(self, hidden: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """The next tokens; the state is one summary a block. See :meth:`Attention.step`."""
        q, k, v, call, state = self._begin_step(hidden, state)
        q, k, v = self._ready(q, k, v, call)
        size = self.block_size or 1
        first, before = divmod(state.seen, size)
        chunks = -(-(before + hidden.shape[1]) // size)
        behind = chunks * size - before - hidden.shape[1]
        q, k, v = (F.pad(each, (0, 0, before, behind)).unflatten(2, (chunks, size)) for each in (q, k, v))
        mixed, sums = self._blended(q, k, v, True, first, state.tensors.get("sums"))
        mixed = mixed.flatten(2, 3)[:, :, before : before + hidden.shape[1]]
        return self.output(self._divided(mixed), call), State(state.seen + hidden.shape[1], {"sums": sums})

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes of the summaries, the same for any number of tokens."""
        return self.blocks * super().cache_bytes(tokens, itemsize)

    def _sizes(self, call: Call, tokens: int) -> torch.Tensor:
        """``[batch or 1]`` tokens of a block."""
        if self.block_size is not None:
            return torch.full((1,), self.block_size, device=call.hidden.device)
        if call.padding is None:
            return torch.full((1,), -(-tokens // self.blocks), device=call.hidden.device)
        return (-(-call.padding.sum(1) // self.blocks)).clamp_min(1)

    def _blended(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        causal: bool,
        first: int = 0,
        old: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unnormalised heads ``[batch, heads, blocks, tokens, head_dim + 1]`` of blocks from ``first`` on, and sums."""
        which = torch.arange(first, first + q.shape[2], device=q.device).clamp_max(self.blocks - 1)
        blend = self.blend.to(q.dtype)
        between = blend[which[:, None], which[None, :]]
        summaries = k.transpose(3, 4) @ v
        near: torch.Tensor | None = None
        if causal:
            near = ((q @ k.transpose(3, 4)).tril() * between.diagonal()[:, None, None]) @ v
            between = between.tril(-1)
        read = torch.einsum("ac,bhcfe->bhafe", between, summaries)
        if old is not None:
            read = read + torch.einsum("ac,bhcfe->bhafe", blend[which], old)
        mixed = q @ read if near is None else near + q @ read
        sums = summaries.new_zeros(*summaries.shape[:2], self.blocks, *summaries.shape[3:]) if old is None else old
        return mixed, sums.index_add(2, which, summaries)


def _taken(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens of ``[batch, heads, tokens, features]`` in the order of ``[batch or 1, wanted]``."""
    index = index.expand(states.shape[0], -1)
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
