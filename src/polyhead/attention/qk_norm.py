"""Attention on unit vectors: logits are cosines times one learned scale."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.attention.base import Attention, Positions
from polyhead.attention.call import AttentionShape, Call
from polyhead.papers import paper

__all__ = ["QKNormAttention"]


@paper("qknorm")
class QKNormAttention(Attention):
    """``softmax(g q_hat k_hat^T) v`` with queries and keys of length 1 and a learned ``g``.

    Args:
        shape: widths.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand; applied before the norm.
        length: tokens of a long text of the data (the paper takes the 97.5th percentile); ``g`` starts at
            ``log2(length^2 - length)``.
        per_head: one ``g`` a head in place of one a layer.

    Source:
        qknorm (Henry et al. 2020, equations 3 to 5).

    Example:
        >>> layer = QKNormAttention(AttentionShape(64, 8), length=128)
        >>> round(layer.gain.item(), 2)
        13.99
    """

    name: ClassVar[str] = "qknorm"
    summary: ClassVar[str] = "Cosine logits with a learned scale"

    def __init__(
        self,
        shape: AttentionShape | None,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        length: int = 512,
        per_head: bool = False,
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        start = math.log2(max(2, length) ** 2 - max(2, length))
        count = shape.heads if per_head and shape is not None else 1
        self.gain = nn.Parameter(torch.full((count, 1, 1), start))

    def inner(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit queries times the scale, and unit keys."""
        return F.normalize(q, dim=-1) * self.gain.to(q.dtype), F.normalize(k, dim=-1)
