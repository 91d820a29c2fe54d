"""Heads whose size does not shrink as they become more: width of the model and of a head set apart."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from polyhead.attention.base import Attention, Positions
from polyhead.attention.call import AttentionShape
from polyhead.papers import paper

__all__ = ["FixedHeadSizeAttention"]


@paper("low-rank-bottleneck")
class FixedHeadSizeAttention(Attention):
    """Multi-head attention with ``head_dim`` of its own: projections ``dim -> heads * head_dim`` and back.

    A head's logits have rank ``head_dim`` at most, and a head of ``tokens - 1`` or more can make any positive pattern
    of so many tokens (:func:`polyhead.lab.low_rank_bottleneck.exact_head`). With ``head_dim = dim / heads`` that falls
    as heads are added; here it does not, and ``dim`` need not be a multiple of ``heads``.

    Args:
        shape: widths; its ``head_dim`` counts where one is given there.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        head_dim: features of a head where ``shape`` leaves them open.

    Source:
        low-rank-bottleneck (arXiv 2002.07028), section 4.

    Example:
        >>> import torch
        >>> FixedHeadSizeAttention(AttentionShape(32, 16), head_dim=24).project(torch.randn(1, 5, 32))[0].shape
        torch.Size([1, 16, 5, 24])
    """

    name: ClassVar[str] = "fixed-head-size"
    summary: ClassVar[str] = "Heads keep their size however many there are"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        head_dim: int = 32,
    ) -> None:
        shape = shape if shape.head_dim is not None else replace(shape, head_dim=head_dim)
        super().__init__(shape, causal=causal, positions=positions)
