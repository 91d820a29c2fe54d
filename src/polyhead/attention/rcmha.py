"""Relative convolutional attention: projections see their neighbours, and logits how far apart two tokens are."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.attention.base import Attention, Positions, Triple, repeat_groups
from polyhead.attention.call import AttentionShape, Call, State
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["RelativeConvAttention"]


@paper("rcmha")
class RelativeConvAttention(Attention):
    """Logits ``((q_i + u) . k_j + (q_i + v) . r_{i-j}) / sqrt(head_dim)`` of queries and keys that are convolved.

    After each projection every channel passes a filter of its own over the last ``kernel`` tokens (values too); where
    tokens see both directions the filter is centred. ``u``, ``v`` and the table ``r`` are learned a head. Filters
    start as the identity, ``u``, ``v`` and ``r`` at 0: plain attention, so ``from_mha`` starts as the trained layer. A
    bias is added after the filter.

    Args:
        shape: widths; ``u``, ``v`` and ``r`` are a query head's.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand, besides; None is what the paper does.
        kernel: tokens a filter sees.
        max_distance: distances beyond count as this one.
        conv: False for relative attention alone (RMHA).
        relative: False for convolution alone (MDHA); with neither it is plain attention.

    Raises:
        InputError: a kernel or a distance below 1.

    Source:
        rcmha (Sugiharto et al. 2023): relative scores as in Transformer-XL, with a learned table, and the
        convolution of Primer, whose kernel of 3 it is taken to mean.

    Example:
        >>> import torch
        >>> layer = RelativeConvAttention(AttentionShape(32, 4), causal=True)
        >>> layer(torch.randn(1, 5, 32)).shape, layer.distances.shape
        (torch.Size([1, 5, 32]), torch.Size([4, 65, 8]))
    """

    name: ClassVar[str] = "rcmha"
    summary: ClassVar[str] = "Convolved projections and learned distances in the logit"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        kernel: int = 3,
        max_distance: int = 64,
        conv: bool = True,
        relative: bool = True,
    ) -> None:
        if kernel < 1 or max_distance < 1:
            raise InputError(f"kernel={kernel}, max_distance={max_distance} was given; expected whole numbers from 1.")
        super().__init__(shape, causal=causal, positions=positions)
        self.conv = conv
        self.kernel = kernel if conv else 1
        self.max_distance = max_distance
        self.relative = relative
        narrow = shape.groups_of * shape.size
        if conv:
            own = (kernel - 1) if causal else kernel // 2
            same = F.one_hot(torch.tensor(own), kernel).float()
            widths = {"q": shape.width, "k": narrow, "v": narrow}
            self.filters = nn.ParameterDict({name: same.repeat(width, 1) for name, width in widths.items()})
        if relative:
            entries = max_distance + 1 if causal else 2 * max_distance + 1
            self.distances = nn.Parameter(torch.zeros(shape.heads, entries, shape.size))
            self.of_content = nn.Parameter(torch.zeros(shape.heads, 1, shape.size))
            self.of_distance = nn.Parameter(torch.zeros(shape.heads, 1, shape.size))

    def project(self, hidden: torch.Tensor) -> Triple:
        """Queries, keys and values, each channel filtered over its neighbours."""
        if not self.conv:
            return super().project(hidden)
        parts = [self._filtered(part, getattr(self, f"{part}_proj"), hidden) for part in "qkv"]
        return parts[0], parts[1], parts[2]

    def score(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Logits ``[batch, heads, query tokens, key tokens]``."""
        if not self.relative:
            return super().score(q, k, call)
        logits = (q + self.of_content) @ repeat_groups(k, q.shape[1]).transpose(2, 3)
        far = self.max_distance
        apart = (call.q_positions[:, :, None] - call.k_positions[:, None, :]).clamp(0 if self.causal else -far, far)
        entry = (apart if self.causal else apart + far)[:, None].expand(len(q), q.shape[1], -1, -1)
        # Every query meets every distance once, and pairs of tokens look their distance up.
        known = (q + self.of_distance) @ self.distances.transpose(1, 2)
        return (logits + known.gather(3, entry)) * self.scale(q, call)

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Keys, values, and the last ``kernel - 1`` tokens themselves."""
        return super().cache_bytes(tokens, itemsize) + min(tokens, self.kernel - 1) * self.dim * itemsize

    def _begin_step(self, hidden: torch.Tensor, state: State | None) -> tuple[Any, Any, Any, Call, State]:
        call, state = self._step_call(hidden, state)
        kept, new = self.kernel - 1, hidden.shape[1]
        whole = torch.cat([state.tensors["tail"], hidden], 1) if "tail" in state.tensors else hidden
        q, k, v = (each[:, :, -new:] for each in self.project(whole))
        if kept:
            call.after["tail"] = whole[:, -kept:].clone()
        q, k = self.position(q, k, call)
        return q, k, v, call, state

    def _filtered(self, part: str, linear: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        # The bias comes after the filter: rows of padding stay zero, as what stands outside of the text.
        found = F.linear(hidden, linear.weight).transpose(1, 2)
        before = self.kernel - 1 if self.causal else self.kernel // 2
        found = F.pad(found, (before, self.kernel - 1 - before))
        found = F.conv1d(found, self.filters[part][:, None], linear.bias, groups=found.shape[1])
        return self.split(found.transpose(1, 2))
