"""Based: Taylor linear attention for all of the text, softmax in a small sliding window for what is near."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from polyhead.attention.base import Attention, LayerMatrices, Positions, Triple
from polyhead.attention.call import AttentionShape
from polyhead.attention.linear import LinearAttention
from polyhead.attention.taylor import taylor_count, taylor_features
from polyhead.attention.transnormer import BlockDiagonalAttention
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["BasedLinearAttention", "SlidingWindowAttention", "based_layers"]


@paper("based")
class BasedLinearAttention(LinearAttention):
    """Linear attention on the second-order Taylor features of ``exp(q . k / sqrt(narrow))``.

    Args:
        shape: widths; its ``head_dim`` is that of the values.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys of ``narrow`` features where they stand.
        narrow: features of a query and a key; the state grows with its square.

    Raises:
        InputError: ``narrow`` below 1.

    Source:
        based (Arora et al. 2024, section 4.1). The equal products ``x_i x_j`` and ``x_j x_i`` are kept once.

    Example:
        >>> layer = BasedLinearAttention(AttentionShape(64, 4), causal=True)
        >>> layer(torch.randn(1, 9, 64)).shape, layer.feature_count()
        (torch.Size([1, 9, 64]), 153)
    """

    name: ClassVar[str] = "based"
    summary: ClassVar[str] = "Linear attention on Taylor features of narrow queries and keys"

    def __init__(
        self, shape: AttentionShape, *, causal: bool = False, positions: Positions | None = None, narrow: int = 16
    ) -> None:
        if narrow < 1:
            raise InputError(f"Queries of {narrow} features were asked for; expected at least 1.")
        self.narrow = narrow
        super().__init__(shape, causal=causal, positions=positions)

    def make_projections(self, shape: AttentionShape) -> None:
        """Stock values and output, narrow queries and keys."""
        super().make_projections(shape)
        self.q_proj = nn.Linear(shape.dim, shape.heads * self.narrow, bias=shape.bias)
        self.k_proj = nn.Linear(shape.dim, shape.groups_of * self.narrow, bias=shape.bias)

    def project(self, hidden: torch.Tensor) -> Triple:
        """Queries and keys ``[batch, heads, tokens, narrow]``, values ``[batch, kv_heads, tokens, head_dim]``."""
        q, k = (proj(hidden).unflatten(2, (-1, self.narrow)).transpose(1, 2) for proj in (self.q_proj, self.k_proj))
        return q, k, self.split(self.v_proj(hidden))

    def features(self, states: torch.Tensor, role: str) -> torch.Tensor:
        """Monomials of states over the fourth root of ``narrow``."""
        return taylor_features(states * self.narrow**-0.25)

    def feature_count(self) -> int:
        """Monomials of a head."""
        return taylor_count(self.narrow)

    @classmethod
    def from_mha(cls, layer: LayerMatrices, **knobs: Any) -> Attention:
        """Refused: the paper learns narrow queries and keys from nothing."""
        raise InputError("BasedLinearAttention has narrow queries and keys; train it, it has no conversion.")


@paper("based")
class SlidingWindowAttention(BlockDiagonalAttention):
    """Softmax attention to tokens less than ``window`` away; time and state do not grow with what lies behind.

    Args:
        shape: widths; None to serve a stock model's steps.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        window: tokens seen to each side, the own one included.

    Raises:
        InputError: a window below 1.

    Source:
        based (Arora et al. 2024, section 4.2).

    Example:
        >>> layer = SlidingWindowAttention(AttentionShape(64, 4), causal=True, window=2)
        >>> layer.attention_weights(torch.randn(1, 3, 64))[0, 0].gt(0).int().tolist()
        [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """

    name: ClassVar[str] = "based-window"
    summary: ClassVar[str] = "Softmax attention in a sliding window"

    def __init__(
        self,
        shape: AttentionShape | None,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        window: int = 64,
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions, block=window)

    def near(self, q_places: torch.Tensor, k_places: torch.Tensor) -> torch.Tensor:
        """Less than a window apart."""
        return (q_places - k_places).abs() < self.block

    def neighbours(self) -> tuple[int, ...]:
        """The block before, the own one and, where both directions are seen, the one behind."""
        return (-1, 0) if self.causal else (-1, 0, 1)

    def kept(self, seen: int) -> int:
        """All but the own token of a window."""
        return min(seen, self.block - 1)


def based_layers(
    shape: AttentionShape, layers: int, causal: bool = True, narrow: int = 16, window: int = 64
) -> list[Attention]:
    """Attention of a Based stack: Taylor features and windows in turn.

    Example:
        >>> [layer.name for layer in based_layers(AttentionShape(64, 4), 3)]
        ['based', 'based-window', 'based']
    """
    return [
        SlidingWindowAttention(shape, causal=causal, window=window)
        if at % 2
        else BasedLinearAttention(shape, causal=causal, narrow=narrow)
        for at in range(layers)
    ]
