"""Query heads that share keys and values: grouped-query and multi-query attention."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from polyhead.attention.base import Attention, LayerMatrices, Positions, copy_matrices, shape_of
from polyhead.attention.call import AttentionShape
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["GroupedQueryAttention"]


@paper("gqa", "mqa")
class GroupedQueryAttention(Attention):
    """Each key-value head is shared by a group of query heads; one for all is multi-query attention.

    Args:
        shape: widths; ``shape.kv_heads`` says how many key-value heads there are.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.

    Source:
        gqa (Ainslie et al. 2023, section 2), mqa (Shazeer 2019, section 3).

    Example:
        >>> import torch
        >>> layer = GroupedQueryAttention(AttentionShape(64, 8, kv_heads=2), causal=True)
        >>> layer(torch.randn(1, 5, 64)).shape
        torch.Size([1, 5, 64])
        >>> layer.cache_bytes(1000) / Attention(AttentionShape(64, 8)).cache_bytes(1000)
        0.25
    """

    name: ClassVar[str] = "gqa"
    summary: ClassVar[str] = "Query heads share key-value heads in groups"

    def __init__(
        self, shape: AttentionShape | None, *, causal: bool = False, positions: Positions | None = None
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)

    @classmethod
    def from_mha(cls, layer: LayerMatrices, *, kv_heads: int | None = None, **knobs: Any) -> GroupedQueryAttention:
        """A layer whose key-value heads are the means of a trained layer's, in groups of neighbours (gqa, section 2.1).

        Args:
            layer: the trained layer.
            kv_heads: how many to keep; None for as many as there are, which gives the layer's own values.
            knobs: ``causal`` and ``positions``.

        Raises:
            InputError: a count that does not divide the layer's key-value heads.
        """
        shape = shape_of(layer)
        kept = shape.groups_of if kv_heads is None else kv_heads
        if kept < 1 or shape.groups_of % kept:
            raise InputError(
                f"{kept} key-value heads were asked for; expected a count that divides the {shape.groups_of} there are."
            )
        made = cls(AttentionShape(shape.dim, shape.heads, kept, shape.size, bias=True), **knobs)
        copy_matrices(made, _Pooled(layer, shape.groups_of // kept))
        return made


class _Pooled:
    """A layer's matrices with neighbouring key-value heads averaged."""

    def __init__(self, layer: LayerMatrices, group: int) -> None:
        def mean(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(0, (-1, group)).mean(1)

        self.query, self.query_bias = layer.query, layer.query_bias
        self.key, self.key_bias = mean(layer.key), mean(layer.key_bias)
        self.value, self.value_bias = mean(layer.value), mean(layer.value_bias)
        self.output, self.output_bias = layer.output, layer.output_bias
