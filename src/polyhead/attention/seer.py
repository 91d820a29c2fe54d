"""SeerAttention: a small gate foresees which blocks of the attention map matter, and only those are computed."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.attention._gather import take, to_front
from polyhead.attention.base import Attention, Positions, repeat_groups
from polyhead.attention.call import AttentionShape, Call, State
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = [
    "SeerAttention",
    "SeerGate",
    "best_blocks",
    "block_attention_targets",
    "block_sparse_attention",
    "gate_loss",
]


class SeerGate(nn.Module):
    """Logits of blocks of the attention map, from pooled queries and keys.

    Queries of a block are averaged; keys are pooled by average, maximum and minimum, side by side. A map of
    each head's own takes both to ``width`` features, whose inner product over ``sqrt(width)`` is the logit.

    Args:
        heads: query heads.
        head_dim: features of a head.
        block: tokens of a block.
        width: features of the gate; None for ``head_dim``.

    Source:
        seer-attention (Gao et al. 2024, section 3). Here queries and keys are pooled after positions, so that the
        keys that decoding keeps are enough; the paper pools before and turns the pooled ones.

    Example:
        >>> gate = SeerGate(heads=4, head_dim=16, block=8)
        >>> gate(torch.randn(1, 4, 30, 16), torch.randn(1, 2, 30, 16)).shape
        torch.Size([1, 4, 4, 4])
    """

    units: torch.Tensor
    """What queries and keys are divided by; 1 unless a fit sets it to their size in a model."""

    def __init__(self, heads: int, head_dim: int, *, block: int = 64, width: int | None = None) -> None:
        super().__init__()
        if block < 1:
            raise InputError(f"Blocks of {block} tokens were asked for; expected at least 1.")
        self.block = block
        width = width or head_dim
        self.query = nn.Parameter(torch.randn(heads, head_dim, width) * head_dim**-0.5)
        self.key = nn.Parameter(torch.randn(heads, 3 * head_dim, width) * (3 * head_dim) ** -0.5)
        self.register_buffer("units", torch.ones(2))

    def forward(self, q: torch.Tensor, k: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
        """``[batch, heads, blocks, blocks]`` logits of blocks, where real tokens come first.

        Args:
            q: ``[batch, heads, tokens, head_dim]``.
            k: ``[batch, kv_heads, tokens, head_dim]``.
            count: ``[batch]`` real tokens; None for all.
        """
        return self.logits(self.pool_queries(q, count), self.pool_keys(k, count))

    def pool_queries(self, q: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
        """``[batch, heads, blocks, head_dim]``: average of each block's real queries."""
        return _pooled(q, self.block, count)[..., : q.shape[3]]

    def pool_keys(self, k: torch.Tensor, count: torch.Tensor | None = None) -> torch.Tensor:
        """``[batch, kv_heads, blocks, 3 x head_dim]``: average, maximum and minimum of each block's real keys."""
        return _pooled(k, self.block, count)

    def logits(self, asked: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Logits of averaged queries ``[batch, heads, ..., head_dim]`` and pooled keys."""
        keys = (repeat_groups(keys, len(self.key)) / self.units[1]) @ self.key
        return ((asked / self.units[0]) @ self.query) @ keys.transpose(2, 3) * self.query.shape[2] ** -0.5


def _pooled(states: torch.Tensor, block: int, count: torch.Tensor | None) -> torch.Tensor:
    tokens = states.shape[2]
    blocks = F.pad(states, (0, 0, 0, -tokens % block)).unflatten(2, (-1, block))
    ends = torch.full((1,), tokens, device=states.device) if count is None else count
    places = torch.arange(blocks.shape[2] * block, device=states.device).view(-1, block)
    real = (places < ends[:, None, None])[:, None, :, :, None]
    some = real.any(3)
    mean = (blocks * real).sum(3) / real.sum(3).clamp_min(1)
    high, low = (blocks.masked_fill(~real, sign * -torch.inf) for sign in (1, -1))
    return torch.cat([mean, high.amax(3).where(some, mean), low.amin(3).where(some, mean)], -1)


def block_attention_targets(weights: torch.Tensor, block: int) -> torch.Tensor:
    """The greatest weight of each block, rows brought to sum 1: what a gate learns to foresee.

    Args:
        weights: ``[batch, heads, tokens, tokens]``.
        block: tokens of a block.

    Returns:
        ``[batch, heads, blocks, blocks]``.

    Example:
        >>> block_attention_targets(torch.eye(4)[None, None], 2)[0, 0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    weights = F.pad(weights, (0, -weights.shape[3] % block, 0, -weights.shape[2] % block))
    most = weights.unflatten(3, (-1, block)).unflatten(2, (-1, block)).amax((3, 5))
    return most / most.sum(-1, keepdim=True).clamp_min(torch.finfo(most.dtype).tiny)


def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, block: int
) -> torch.Tensor:
    """Causal softmax attention of each block of queries to some earlier blocks of keys and to its own.

    Only chosen blocks are gathered and multiplied, so time grows with ``tokens x chosen blocks``.

    Args:
        q: ``[batch, heads, tokens, head_dim]``, scaled.
        k, v: ``[batch, heads, tokens, head_dim]``.
        chosen: ``[batch, heads, blocks, any]`` which blocks each block of queries looks at, besides its own; those not
            earlier than itself stand for none.
        block: tokens of a block.

    Returns:
        ``[batch, heads, tokens, head_dim]``.
    """
    tokens = q.shape[2]
    q, k, v = (F.pad(each, (0, 0, 0, -tokens % block)).unflatten(2, (-1, block)) for each in (q, k, v))
    own = torch.arange(q.shape[2], device=q.device)[:, None]
    looked = torch.cat([chosen, own.expand(*chosen.shape[:3], 1)], 3)
    k, v = (take(each.flatten(3), looked).unflatten(4, each.shape[3:]).flatten(3, 4) for each in (k, v))
    inside = torch.arange(block, device=q.device)
    earlier = (looked[..., :-1] < own)[..., None].expand(*chosen.shape, block).flatten(3)[..., None, :]
    before = (inside <= inside[:, None]).expand(*looked.shape[:3], -1, -1)
    met = torch.cat([earlier.expand(*before.shape[:4], -1), before], -1)
    mixed = F.scaled_dot_product_attention(
        q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), attn_mask=met.flatten(1, 2), scale=1.0
    )
    return mixed.unflatten(1, (q.shape[1], -1)).flatten(2, 3)[:, :, :tokens]


@paper("seer-attention")
class SeerAttention(Attention):
    """Attention to the own block and to the ``keep`` earlier blocks that a gate foresees to matter.

    While training, attention is dense and ``balance_loss`` is the divergence of the gate from the block maxima
    of the true map; it reaches the gate only.

    Args:
        shape: widths.
        causal: True; blocks are chosen backwards.
        positions: tells queries and keys where they stand.
        block: tokens of a block.
        keep: earlier blocks looked at.
        choice: "token" asks with the mean of the block's queries so far, so that nothing leaks and steps agree with
            the whole; "block" asks once for a block with the mean of all its queries, as the paper does for prompts,
            and computes chosen blocks only. Both agree at the last token of a block.

    Raises:
        InputError: counts below 1, another choice, or ``causal=False``.

    Source:
        seer-attention (Gao et al. 2024).

    Example:
        >>> layer = SeerAttention(AttentionShape(64, 4), block=8, keep=1).eval()
        >>> layer.attention_weights(torch.randn(1, 40, 64))[0, 0, 39].gt(0).sum().item()
        16
    """

    name: ClassVar[str] = "seer-attention"
    summary: ClassVar[str] = "A learned gate on pooled queries and keys chooses blocks of the past"
    both_directions: ClassVar[bool] = False

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = True,
        positions: Positions | None = None,
        block: int = 64,
        keep: int = 8,
        choice: Literal["token", "block"] = "token",
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        if keep < 1 or choice not in ("token", "block"):
            raise InputError(f"keep={keep} and choice={choice!r} were given; expected from 1, and 'token' or 'block'.")
        self.gate = SeerGate(shape.heads, shape.size, block=block)
        self.keep = keep
        self.choice = choice

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads ``[batch, heads, tokens, head_dim]``: dense while training, chosen blocks otherwise."""
        whole = q.shape[2] == k.shape[2]
        self.balance_loss = self._distilled(q, k, call) if self.training and whole else None
        if self.training or self.choice == "token" or not whole:
            return super().attend(q, k, v, call)
        order, count = _front(call)
        asked, k = self.inner(q, repeat_groups(k, q.shape[1]), call)
        parts = [asked, k, repeat_groups(v, q.shape[1]), q]
        if order is not None:
            parts = [take(each, order.expand(-1, each.shape[1], -1)) for each in parts]
        scores = self.gate(parts[3], parts[1], count)
        chosen = best_blocks(scores, torch.arange(scores.shape[2], device=q.device)[:, None], self.keep)
        mixed = block_sparse_attention(parts[0], parts[1], parts[2], chosen, self.gate.block)
        return mixed if order is None else take(mixed, order.argsort(2).expand(-1, q.shape[1], -1))

    def weights(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Weights ``[batch, heads, tokens, tokens]``, zero outside of chosen blocks."""
        return super().weights(q, k, call)

    def choose(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor | None:
        """``[batch, heads, query tokens, key tokens]`` the own block and the chosen ones; all while training."""
        allowed = call.allowed()
        if self.training:
            return allowed
        block, (order, count) = self.gate.block, _front(call)
        own = call.q_positions // block
        if order is not None:
            q, k = (take(each, order.expand(-1, each.shape[1], -1)) for each in (q, k))
        asked = self._asked(q, call) if self.choice == "token" else self._whole_blocks(q, count)
        if order is not None:
            asked = take(asked, order.argsort(2).expand(-1, q.shape[1], -1))
        scores = self.gate.logits(asked, self.gate.pool_keys(k, count))
        at = own[:, None, :, None].expand(len(q), -1, -1, -1)
        opened = torch.zeros_like(scores, dtype=torch.bool).scatter(3, best_blocks(scores, at, self.keep), True)
        opened = opened.scatter(3, at.expand(-1, q.shape[1], -1, -1), True)
        of_key = (call.k_positions // block)[:, None, None].expand(len(q), *opened.shape[1:3], -1)
        met = opened.gather(3, of_key)
        return met if allowed is None else met & allowed

    def step(self, hidden: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """The next tokens; refused with ``choice="block"``. See :meth:`Attention.step`."""
        if self.choice == "block" and self.causal:
            raise InputError("A step was asked with choice='block', which needs whole blocks; expected choice='token'.")
        return super().step(hidden, state)

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes of keys and values, and of the sum of the queries of the block that is being written."""
        assert self.shape is not None
        return super().cache_bytes(tokens, itemsize) + self.shape.width * itemsize

    def _asked(self, q: torch.Tensor, call: Call) -> torch.Tensor:
        """``[batch, heads, tokens, head_dim]`` mean of a block's queries so far."""
        block, tokens = self.gate.block, q.shape[2]
        begun = 0 if call.before is None else int(call.q_positions[0, 0]) % block
        front = q.new_zeros(*q.shape[:2], 1, q.shape[3])
        if begun and call.before is not None:
            front = call.before["asked"]
        blocks = F.pad(torch.cat([front, q], 2), (0, 0, max(begun - 1, 0), 0)) if begun else q
        blocks = F.pad(blocks, (0, 0, 0, -(begun + tokens) % block)).unflatten(2, (-1, block))
        sums = blocks.cumsum(3).flatten(2, 3)[:, :, begun : begun + tokens]
        if call.before is not None:
            call.after["asked"] = sums[:, :, -1:].clone()
        inside = (torch.arange(begun, begun + tokens, device=q.device) % block + 1).to(q.dtype)
        return sums / inside[:, None]

    def _whole_blocks(self, q: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
        return self.gate.pool_queries(q, count).repeat_interleave(self.gate.block, 2)[:, :, : q.shape[2]]

    def _distilled(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        order, count = _front(call)
        q, k = q.detach(), k.detach()
        weights = self.weigh(self.score(q, k, call), call.allowed())
        if order is not None:
            q, k = (take(each, order.expand(-1, each.shape[1], -1)) for each in (q, k))
            weights = take(weights, order.expand(-1, q.shape[1], -1)).transpose(2, 3)
            weights = take(weights, order.expand(-1, q.shape[1], -1)).transpose(2, 3)
            real = torch.arange(q.shape[2], device=q.device) < count[:, None] if count is not None else None
            weights = weights if real is None else weights * real[:, None, :, None]
        return gate_loss(self.gate(q, k, count), block_attention_targets(weights, self.gate.block))


def gate_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Divergence ``KL(targets, softmax(logits))`` over blocks not behind a row's own, mean over rows that have any.

    Args:
        logits, targets: ``[batch, heads, blocks, blocks]``.
    """
    later = torch.ones(logits.shape[2:], dtype=torch.bool, device=logits.device).triu(1)
    logp = logits.masked_fill(later, torch.finfo(logits.dtype).min).log_softmax(-1)
    each = (torch.xlogy(targets, targets) - targets * logp).sum(-1)
    return each.sum() / (targets.sum(-1) > 0).sum().clamp_min(1)


def best_blocks(scores: torch.Tensor, own: torch.Tensor, keep: int) -> torch.Tensor:
    """The ``keep`` best of the blocks before the own; where there are fewer, some that are not before it."""
    behind = torch.arange(scores.shape[3], device=scores.device) >= own
    return scores.masked_fill(behind, -torch.inf).topk(min(keep, scores.shape[3]), -1).indices


def _front(call: Call) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``[batch, 1, tokens]`` the order that puts real tokens first, and how many there are."""
    return (None, None) if call.padding is None else (to_front(call.padding)[:, None], call.padding.sum(1))
