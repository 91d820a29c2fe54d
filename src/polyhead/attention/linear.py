"""Linear attention: weights that are inner products of features, so that keys and values can be summed up first.

``heads_i = sum_j (phi(q_i) . phi(k_j)) decay^(i-j) v_j``, divided by the sum of weights where the mechanism says so.
Without order that is two products; in order it is computed block by block, all blocks at once: inside a block as a
small attention matrix, between blocks through one ``[features, head_dim]`` state a block. A step carries one state.
A subclass gives ``features``, and may change ``normalize``, ``decay`` and ``finish``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from polyhead.attention.base import Attention, repeat_groups
from polyhead.attention.call import Call, State
from polyhead.errors import InputError

__all__ = ["LinearAttention", "causal_linear"]


def causal_linear(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decay: torch.Tensor | None = None, block: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """``out_i = sum_{j <= i} decay^(i-j) (q_i . k_j) v_j`` for every token, and the state after the last.

    Args:
        q, k: ``[batch, heads, tokens, features]``.
        v: ``[batch, heads, tokens, head_dim]``.
        decay: ``[heads]`` in (0, 1], or None for 1.
        block: tokens computed as one small matrix; changes time, not values.

    Returns:
        ``[batch, heads, tokens, head_dim]`` and ``[batch, heads, features, head_dim]``.
    """
    tokens = q.shape[2]
    blocks = -(-tokens // block)
    spare = blocks * block - tokens
    q, k, v = (F.pad(each, (0, 0, spare, 0)).unflatten(2, (blocks, block)) for each in (q, k, v))
    place = torch.arange(block, device=q.device)
    apart = (place[:, None] - place[None, :]).to(q.dtype)
    inside = (apart >= 0).to(q.dtype)
    arrive = leave = between = None
    if decay is not None:
        rate = decay.to(q.dtype)[:, None, None]
        inside = inside * rate ** apart.clamp_min(0)
        inside = inside[:, None]
        leave = (rate[..., 0] ** (block - 1 - place))[:, None, :, None]
        arrive = (rate[..., 0] ** (place + 1))[:, None, :, None]
        gap = torch.arange(blocks, device=q.device)[:, None] - torch.arange(blocks, device=q.device)[None, :] - 1
        between = (gap >= 0) * rate ** (block * gap.clamp_min(0))
    near = ((q @ k.transpose(3, 4)) * inside) @ v
    states = (k if leave is None else k * leave).transpose(3, 4) @ v
    if between is None:
        before = F.pad(states.cumsum(2), (0, 0, 0, 0, 1, 0))
        last, before = before[:, :, -1].clone(), before[:, :, :-1]
    else:
        before = torch.einsum("hcd,bhdfe->bhcfe", between, states)
        last = rate**block * before[:, :, -1] + states[:, :, -1]
    far = (q if arrive is None else q * arrive) @ before
    return (near + far).flatten(2, 3)[:, :, spare:], last


class LinearAttention(Attention):
    """Base of linear mechanisms, and the plain one: features ``1 + elu``, divided by the sum of weights.

    Example:
        >>> import torch
        >>> from polyhead.attention import AttentionShape
        >>> layer = LinearAttention(AttentionShape(32, 4), causal=True)
        >>> out, state = layer.step(torch.randn(1, 5, 32))
        >>> out.shape, state.seen
        (torch.Size([1, 5, 32]), 5)
    """

    name: ClassVar[str] = "linear"
    summary: ClassVar[str] = "Linear attention with features 1 + elu"
    cost: ClassVar[str] = "tokens"
    normalize: ClassVar[bool] = True
    """Whether heads are divided by the sum of their weights."""
    block: int = 64

    def features(self, states: torch.Tensor, role: str) -> torch.Tensor:
        """``[batch, heads, tokens, head_dim]`` -> ``[batch, heads, tokens, features]``; role: "query" or "key"."""
        return 1 + F.elu(states)

    def feature_count(self) -> int:
        """Features of a head."""
        assert self.shape is not None
        return self.shape.size

    def decay(self) -> torch.Tensor | None:
        """``[heads]`` how much of a weight is left one token further, or None for all of it."""
        return None

    def finish(self, heads: torch.Tensor) -> torch.Tensor:
        """Heads ``[batch, heads, tokens, head_dim]`` before the output projection."""
        return heads

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads ``[batch, heads, tokens, head_dim]`` in time that grows with tokens."""
        if call.mask is not None:
            raise InputError(f"{type(self).__name__} was given a mask of its own; it knows padding and causal only.")
        q, k, v = self._ready(q, k, v, call)
        mixed = causal_linear(q, k, v, self.decay(), self.block)[0] if call.causal else self._all(q, k, v, call)
        return self._divided(mixed)

    def weights(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """The weights ``[batch, heads, tokens, tokens]`` that are never formed in a run."""
        ones = torch.ones_like(k)
        q, k, _ = self._ready(q, k, ones, call)
        dense = (q @ k.transpose(2, 3)) * self._decays(call).to(q.dtype)
        allowed = call.allowed()
        dense = dense if allowed is None else dense.masked_fill(~allowed, 0.0)
        return dense / dense.sum(-1, keepdim=True) if self.normalize else dense

    def step(self, hidden: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """The next tokens; the state has one size for any number of tokens seen. See :meth:`Attention.step`."""
        q, k, v, call, state = self._begin_step(hidden, state)
        q, k, v = self._ready(q, k, v, call)
        mixed, last = causal_linear(q, k, v, self.decay(), self.block)
        if "sums" in state.tensors:
            old, rate = state.tensors["sums"], self.decay()
            if rate is not None:
                passed = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
                powers = rate.to(q.dtype)[:, None] ** passed
                mixed = mixed + (q * powers[..., None]) @ old
                last = last + powers[:, -1, None, None] * old
            else:
                mixed, last = mixed + q @ old, last + old
        out = self.output(self._divided(mixed), call)
        return out, State(state.seen + hidden.shape[1], {"sums": last} | call.after)

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes of the state, the same for any number of tokens."""
        assert self.shape is not None
        return self.shape.heads * self.feature_count() * (self.shape.size + self.normalize) * itemsize

    def _ready(self, q: Any, k: Any, v: Any, call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = q.shape[1]
        q, k = self.features(q, "query"), repeat_groups(self.features(k, "key"), heads)
        if call.padding is not None:
            k = k * call.padding[:, None, :, None].to(k.dtype)
        v = repeat_groups(v, heads)
        return q, k, F.pad(v, (0, 1), value=1.0) if self.normalize else v

    def _all(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        if self.decay() is not None:
            return ((q @ k.transpose(2, 3)) * self._decays(call).to(q.dtype)) @ v
        return q @ (k.transpose(2, 3) @ v)

    def _decays(self, call: Call) -> torch.Tensor:
        rate = self.decay()
        if rate is None:
            return torch.ones((), device=call.q_positions.device)
        apart = (call.q_positions[:, :, None] - call.k_positions[:, None, :]).abs()
        return rate[None, :, None, None] ** apart[:, None]

    def _divided(self, mixed: torch.Tensor) -> torch.Tensor:
        if self.normalize:
            total = mixed[..., -1:]
            mixed = mixed[..., :-1] / torch.where(total.abs() < 1e-12, torch.ones_like(total), total)
        return self.finish(mixed)
