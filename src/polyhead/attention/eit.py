"""Many-to-many heads: every query head meets every key head, and small networks make the maps of it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from polyhead.attention.base import Attention, LayerMatrices, Positions, copy_matrices, repeat_groups, shape_of
from polyhead.attention.call import AttentionShape, Call
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["EnhancedInteractiveAttention", "head_consensus"]


@paper("eit")
class EnhancedInteractiveAttention(Attention):
    """All ``heads^2`` maps ``q_i k_j^T``, brought to one a head in two stages, then softmax.

    Inner stage: the maps of query head ``i`` go through a small network of their own, ``heads -> inner / heads -> 1``.
    Cross stage: the ``heads`` maps go through ``heads -> cross -> heads``. A ReLU stands inside each network.
    The efficient form has one network: the inner stage's first layer, a ReLU, and one layer over all of it.

    Args:
        shape: widths; key-value heads that are shared are repeated.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        inner: maps inside the inner stage, a multiple of the heads; None for ``8 heads``.
        cross: maps inside the cross stage; None for ``4 heads``.
        efficient: merge the stages.

    Raises:
        InputError: counts that do not divide.

    Source:
        eit (Zheng et al. 2023).

    Example:
        >>> import torch
        >>> layer, hidden = EnhancedInteractiveAttention(AttentionShape(32, 4)), torch.randn(1, 5, 32)
        >>> layer.attention_weights(hidden).shape
        torch.Size([1, 4, 5, 5])
    """

    name: ClassVar[str] = "eit"
    summary: ClassVar[str] = "Every query head meets every key head; small networks make one map a head"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        inner: int | None = None,
        cross: int | None = None,
        efficient: bool = False,
    ) -> None:
        heads = shape.heads
        inner = 8 * heads if inner is None else inner
        cross = 4 * heads if cross is None else cross
        if inner < heads or inner % heads or cross < 1:
            raise InputError(
                f"inner={inner} and cross={cross} for {heads} heads were given; expected a multiple of the heads, "
                "and 1 or more."
            )
        super().__init__(shape, causal=causal, positions=positions)
        self.efficient = efficient
        own = inner // heads
        self.inner_in = _scaled(heads, own, heads, fan=heads)
        if efficient:
            self.merge = _scaled(heads, inner, fan=inner)
        else:
            self.inner_out = _scaled(heads, own, fan=own)
            self.cross_in = _scaled(cross, heads, fan=heads)
            self.cross_out = _scaled(heads, cross, fan=cross)

    def score(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Logits ``[batch, heads, query tokens, key tokens]`` made of the maps of all pairs of heads."""
        q, k = self.inner(q, k, call)
        k = repeat_groups(k, q.shape[1])
        # W (q_i . k_j) = q_i . (W k)_j: the first layer acts on keys, so heads^2 maps are never kept.
        met = torch.einsum("hcj,bjtd->bhctd", self.inner_in, k)
        maps = (q[:, :, None] @ met.transpose(3, 4)).relu()
        if self.efficient:
            return torch.einsum("hc,bcij->bhij", self.merge, maps.flatten(1, 2))
        logits = torch.einsum("hc,bhcij->bhij", self.inner_out, maps)
        return torch.einsum(
            "hc,bcij->bhij", self.cross_out, torch.einsum("ch,bhij->bcij", self.cross_in, logits).relu()
        )

    @torch.no_grad()
    def select_own(self) -> None:
        """Set the networks so that head ``i`` gets the map of its own query and key: plain attention.

        Raises:
            InputError: fewer than two maps a head inside a stage; a ReLU keeps a number only as its two signs.
        """
        heads, own = self.inner_in.shape[:2]
        if own < 2 or (not self.efficient and len(self.cross_in) < 2 * heads):
            raise InputError("select_own() was asked of stages with fewer than two maps a head; expected two or more.")
        each = torch.arange(heads)
        for weight in self._networks():
            weight.zero_()
        self.inner_in[each, 0, each], self.inner_in[each, 1, each] = 1.0, -1.0
        if self.efficient:
            self.merge[each, each * own], self.merge[each, each * own + 1] = 1.0, -1.0
            return
        self.inner_out[:, 0], self.inner_out[:, 1] = 1.0, -1.0
        self.cross_in[2 * each, each], self.cross_in[2 * each + 1, each] = 1.0, -1.0
        self.cross_out[each, 2 * each], self.cross_out[each, 2 * each + 1] = 1.0, -1.0

    @classmethod
    def from_mha(cls, layer: LayerMatrices, **knobs: Any) -> EnhancedInteractiveAttention:
        """A layer of a trained one's values: its weights, and networks that select (:meth:`select_own`)."""
        made = cls(shape_of(layer), **knobs)
        copy_matrices(made, layer)
        made.select_own()
        return made

    def _networks(self) -> list[nn.Parameter]:
        if self.efficient:
            return [self.inner_in, self.merge]
        return [self.inner_in, self.inner_out, self.cross_in, self.cross_out]


def _scaled(*shape: int, fan: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * (2 / fan) ** 0.5)


def head_consensus(weights: torch.Tensor) -> float:
    """Mean cosine between the maps of two heads, ``[batch, heads, queries, keys]``: 1 where all are the same."""
    flat = torch.nn.functional.normalize(weights.flatten(2), dim=-1)
    heads = weights.shape[1]
    alike = flat @ flat.transpose(1, 2)
    return float((alike.sum((1, 2)) - heads).mean() / (heads * (heads - 1)))
