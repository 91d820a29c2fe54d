"""Learned relative positions inside the logit: four ways, and Shaw's."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from polyhead.attention.base import Attention, Positions, repeat_groups
from polyhead.attention.call import AttentionShape, Call
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["RelativeLogitsAttention"]

_METHODS = ("m1", "m2", "m3", "m4", "shaw")


@paper("better-relative-position")
class RelativeLogitsAttention(Attention):
    """Logits with a learned ``a`` of the distance ``j - i`` (cut at ``max_distance``), over ``sqrt(head_dim)``.

    m1 ``(q.k) a_|i-j|``; m2 the same with a signed distance; m3 ``sum_d q_d k_d a_d``; m4 ``q.k + q.a + k.a``;
    shaw ``q.k + q.a``. Tables start at 1 (m1 to m3) or 0, which is plain attention.

    Args:
        shape: widths.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand, besides; None is what the paper does.
        method: "m1", "m2", "m3", "m4" (the paper's choice) or "shaw". m3 takes ``head_dim`` times the memory of logits.
        max_distance: distances beyond count as this one.
        per_head: one table a head, in place of one a layer.

    Raises:
        InputError: another method, or a distance below 1.

    Source:
        better-relative-position (Huang et al. 2020), methods 1 to 4.

    Example:
        >>> import torch
        >>> layer = RelativeLogitsAttention(AttentionShape(32, 4), max_distance=16)
        >>> layer(torch.randn(1, 100, 32)).shape, layer.table.shape
        (torch.Size([1, 100, 32]), torch.Size([4, 33, 8]))
    """

    name: ClassVar[str] = "better-relative-position"
    summary: ClassVar[str] = "A learned vector of the distance meets query and key in the logit"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        method: Literal["m1", "m2", "m3", "m4", "shaw"] = "m4",
        max_distance: int = 64,
        per_head: bool = True,
    ) -> None:
        if method not in _METHODS or max_distance < 1:
            raise InputError(
                f"method={method!r} with max_distance={max_distance} was given; expected one of {', '.join(_METHODS)}, "
                "and a distance from 1."
            )
        super().__init__(shape, causal=causal, positions=positions)
        self.method = method
        self.max_distance = max_distance
        entries = max_distance + 1 if method == "m1" else 2 * max_distance + 1
        width = 1 if method in ("m1", "m2") else shape.size
        start = torch.zeros if method in ("m4", "shaw") else torch.ones
        self.table = nn.Parameter(start(shape.heads if per_head else 1, entries, width))

    def score(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Logits ``[batch, heads, query tokens, key tokens]`` that know the distance."""
        q, k = q * self.scale(q, call), repeat_groups(k, q.shape[1])
        apart = (call.k_positions[:, None, :] - call.q_positions[:, :, None]).clamp(
            -self.max_distance, self.max_distance
        )
        entry = apart.abs() if self.method == "m1" else apart + self.max_distance
        if self.method == "m3":
            near = self.table[:, entry].transpose(0, 1)  # [batch or 1, heads or 1, queries, keys, head_dim]
            near = near.expand(len(q), q.shape[1], -1, -1, -1)
            return torch.einsum("bhid,bhijd,bhjd->bhij", q, near, k)
        logits = q @ k.transpose(2, 3)
        if self.method in ("m1", "m2"):
            return logits * self.table[:, entry, 0].transpose(0, 1)
        entry = entry[:, None].expand(len(q), q.shape[1], -1, -1)
        logits = logits + (q @ self.table.transpose(1, 2)).gather(3, entry)
        if self.method == "shaw":
            return logits
        of_keys = (k * self.scale(k, call)) @ self.table.transpose(1, 2)
        return logits + of_keys.gather(3, entry.transpose(2, 3)).transpose(2, 3)
