"""A span for each head: sliding windows that may grow with the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from polyhead.attention.base import Attention, Positions
from polyhead.attention.call import AttentionShape, Call, State
from polyhead.attention.flex import UNIT, span_attention
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["ElasticSpan", "SpanAttention", "span_density", "spans_at", "who_meets"]


@dataclass(frozen=True)
class ElasticSpan:
    """``floor(start + grow x length)`` tokens that a head looks back, its own included, and at least 1.

    Both numbers are rounded up to a millionth of a token.

    Attributes:
        start: tokens.
        grow: tokens more for each token of the text, 0 to 1.

    Raises:
        InputError: a negative start, or a growth outside 0 to 1.

    Example:
        >>> ElasticSpan(16, 0.25).at(100)
        41
    """

    start: float
    grow: float = 0.0

    def __post_init__(self) -> None:
        if self.start < 0 or not 0 <= self.grow <= 1:
            raise InputError(
                f"A span of {self.start} + {self.grow} x length was given; expected start >= 0 and grow from 0 to 1."
            )

    def at(self, length: int) -> int:
        """Tokens at a length of text."""
        start, grow = self.fixed
        return max(1, (start + grow * length) // UNIT)

    @property
    def fixed(self) -> tuple[int, int]:
        """Start and growth as whole numbers of ``1 / UNIT`` tokens, rounded up, so that all ways of counting agree."""
        return math.ceil(self.start * UNIT), math.ceil(self.grow * UNIT)


def span_density(spans: Sequence[ElasticSpan], length: int, sinks: int = 4) -> np.ndarray:
    """``[spans]`` share of the pairs of causal attention that are left in a text of ``length`` tokens."""
    places = torch.arange(length)
    met = who_meets(spans_at(spans, places[None] + 1), places[None], places[None], sinks)[0]
    return (met & (places <= places[:, None])).sum((1, 2)).numpy() / (length * (length + 1) / 2)


@paper("moa-sparse")
class SpanAttention(Attention):
    """Each head looks back over a span of its own, and at the first tokens always.

    The span of a query grows with the text up to it, so a step gives what the whole gives. Steps keep for each
    key-value head what its span can still reach and no more.

    Args:
        shape: widths; None to serve a stock model's steps.
        causal: True; spans look back.
        positions: tells queries and keys where they stand.
        spans: one a query head; None for 64 tokens in every second head, and a quarter of the text in the others.
        sinks: first tokens that every head sees.
        flex: skip blocks out of reach by :mod:`polyhead.attention.flex` where it applies (whole texts without padding
            and without gradients); it compiles for some seconds at first.

    Raises:
        InputError: another number of spans than heads, or fewer than 0 sinks.

    Source:
        moa-sparse (Fu et al. 2024, section 4.1). The paper gives all queries of a text the span of its whole
        length; here each has that of its own place, which is what decoding sees.

    Example:
        >>> spans = [ElasticSpan(2), ElasticSpan(0, 0.5), ElasticSpan(0, 1), ElasticSpan(8)]
        >>> layer = SpanAttention(AttentionShape(64, 4), spans=spans, sinks=1)
        >>> layer.attention_weights(torch.randn(1, 10, 64))[0, :, 9].gt(0).sum(-1).tolist()
        [3, 6, 10, 9]
    """

    name: ClassVar[str] = "moa-sparse"
    summary: ClassVar[str] = "Each head looks back over a span of its own, which may grow with the text"
    both_directions: ClassVar[bool] = False

    def __init__(
        self,
        shape: AttentionShape | None,
        *,
        causal: bool = True,
        positions: Positions | None = None,
        spans: Sequence[ElasticSpan] | None = None,
        sinks: int = 4,
        flex: bool = False,
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        if spans is None:
            if shape is None:
                raise InputError("A SpanAttention without a shape was given no spans; expected one a query head.")
            spans = [ElasticSpan(0, 0.25) if head % 2 else ElasticSpan(64) for head in range(shape.heads)]
        if sinks < 0 or (shape is not None and len(spans) != shape.heads):
            raise InputError(
                f"{len(spans)} spans and {sinks} sinks were given; expected a span a head, and sinks from 0."
            )
        self.spans = tuple(spans)
        self.sinks = sinks
        self.flex = flex

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads ``[batch, heads, query tokens, head_dim]``, blocks out of reach skipped where ``flex`` applies."""
        plain = call.causal and call.padding is None and call.mask is None and q.shape[2] == k.shape[2]
        if not self.flex or not plain:
            return super().attend(q, k, v, call)
        q, k = self.inner(q, k, call)
        return span_attention(q, k, v, torch.tensor([span.fixed for span in self.spans]), self.sinks)

    def weights(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Weights ``[batch, heads, query tokens, key tokens]``, zero out of reach."""
        return super().weights(q, k, call)

    def choose(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """``[batch or 1, heads, query tokens, key tokens]``."""
        met = who_meets(spans_at(self.spans, call.q_positions + 1), call.q_positions, call.k_positions, self.sinks)
        allowed = call.allowed()
        return met if allowed is None else met & allowed

    def step(self, hidden: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """The next tokens; the state holds ``[batch, tokens of all heads, head_dim]``, of each what it needs.

        See :meth:`Attention.step`.
        """
        q, k, v, call, state = self._begin_step(hidden, state)
        assert self.shape is not None
        seen, groups = state.seen + hidden.shape[1], self.shape.groups_of
        places = call.k_positions.expand(groups, -1)
        real = torch.ones_like(places, dtype=torch.bool)
        if state.tensors:
            index, before, held = self._packed(state.seen, hidden.device)
            old = (state.tensors[name][:, index] for name in ("keys", "values"))
            k, v = (torch.cat([kept, new], 2) for kept, new in zip(old, (k, v), strict=True))
            places, real = torch.cat([before, places], 1), torch.cat([held, real], 1)
        spans = spans_at(self.spans, call.q_positions + 1)[0]
        apart = call.q_positions[0][:, None] - places.repeat_interleave(self.shape.heads // groups, 0)[:, None]
        met = (apart < spans[..., None]) | (apart > call.q_positions[0][:, None] - self.sinks)
        met = met & (apart >= 0) & real.repeat_interleave(self.shape.heads // groups, 0)[:, None]
        q, k = self.inner(q, k, call)
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=met[None], scale=1.0, enable_gqa=groups != q.shape[1])
        recent, first = self._kept(seen)
        ahead = seen - recent.to(places.device)[:, None]
        stays = real & ((places >= ahead) | (places < first.to(places.device)[:, None]))
        return self.output(heads, call), State(seen, {"keys": k[:, stays], "values": v[:, stays]})

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes that spans can still reach, each key-value head its own."""
        assert self.shape is not None
        return 2 * self.shape.size * int(sum(each.sum() for each in self._kept(tokens))) * itemsize

    def _kept(self, seen: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``[kv_heads]`` latest tokens that the next query can reach, and first ones besides."""
        assert self.shape is not None
        spans = torch.tensor([span.at(seen + 1) for span in self.spans]).view(self.shape.groups_of, -1).amax(1)
        recent = (spans - 1).clamp_max(seen)
        return recent, (seen - recent).clamp_max(self.sinks)

    def _packed(self, seen: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``[kv_heads, most tokens of a head]``: where a packed state holds them, their places, and which there are."""
        recent, first = self._kept(seen)
        count = recent + first
        slots = torch.arange(int(count.max()) if len(count) else 0)
        begin = (count.cumsum(0) - count)[:, None]
        held = slots < count[:, None]
        places = torch.where(slots < first[:, None], slots, seen - count[:, None] + slots)
        return torch.where(held, begin + slots, 0).to(device), places.to(device), held.to(device)


def spans_at(spans: Sequence[ElasticSpan], lengths: torch.Tensor) -> torch.Tensor:
    """``[batch, spans, queries]`` tokens at lengths ``[batch, queries]``."""
    fixed = torch.tensor([span.fixed for span in spans], device=lengths.device)
    return ((fixed[:, :1] + fixed[:, 1:] * lengths[:, None]) // UNIT).clamp_min(1)


def who_meets(spans: torch.Tensor, asked: torch.Tensor, places: torch.Tensor, sinks: int) -> torch.Tensor:
    """``[batch, heads, queries, keys]`` who lies in whose span ``[batch, heads, queries]``, or among the first."""
    apart = asked[:, :, None] - places[:, None, :]
    return (apart[:, None] < spans[..., None]) | (places < sinks)[:, None, None, :]
