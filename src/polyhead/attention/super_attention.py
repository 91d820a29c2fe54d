"""Attention with fewer matrices: raw slices for values, then for keys, then a learned map between tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from polyhead.attention.base import Attention, LayerMatrices, Positions, Triple, repeat_groups
from polyhead.attention.call import AttentionShape, Call
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["EfficientAttention", "OptimisedAttention", "SuperAttention"]


@paper("super-attention")
class OptimisedAttention(Attention):
    """No value matrix: head ``h`` reads the ``h``-th slice of the states, and the output matrix takes the lost map in.

    Three quarters of the weights of plain attention.

    Args:
        shape: widths; heads that fill the features exactly, each with its own keys and values.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.

    Raises:
        InputError: other widths.

    Source:
        super-attention (Hosseini and Hosseini 2024), "optimised".

    Example:
        >>> layer = OptimisedAttention(AttentionShape(32, 4))
        >>> sum(each.numel() for each in layer.parameters()) / (4 * 32 * 32)
        0.75
    """

    name: ClassVar[str] = "optimised-attention"
    summary: ClassVar[str] = "Values are raw slices of the states"

    def __init__(self, shape: AttentionShape, *, causal: bool = False, positions: Positions | None = None) -> None:
        if shape.width != shape.dim or shape.groups_of != shape.heads:
            raise InputError(
                f"{shape.heads} heads of {shape.size} with {shape.groups_of} key-value heads over {shape.dim} features "
                "were given; raw slices need heads that fill the features, and as many key-value heads."
            )
        super().__init__(shape, causal=causal, positions=positions)

    def make_projections(self, shape: AttentionShape) -> None:
        """Queries, keys and output."""
        self.q_proj = nn.Linear(shape.dim, shape.dim, bias=shape.bias)
        self.k_proj = nn.Linear(shape.dim, shape.dim, bias=shape.bias)
        self.o_proj = nn.Linear(shape.dim, shape.dim, bias=shape.bias)

    def project(self, hidden: torch.Tensor) -> Triple:
        """Queries, keys, and slices as values."""
        return self.split(self.q_proj(hidden)), self.split(self.k_proj(hidden)), self.split(hidden)

    @classmethod
    def from_mha(cls, layer: LayerMatrices, **knobs: object) -> Attention:
        """Refused: a trained head reads all features, a slice does not; the paper trains from scratch.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{cls.__name__} was to start from a trained layer; it reads raw slices: train it from scratch."
        )


class EfficientAttention(OptimisedAttention):
    """Neither value nor key matrix: both are the raw slice. Half of the weights of plain attention.

    Source:
        super-attention, "efficient".

    Example:
        >>> layer = EfficientAttention(AttentionShape(32, 4))
        >>> sum(each.numel() for each in layer.parameters()) / (4 * 32 * 32)
        0.5
    """

    name: ClassVar[str] = "efficient-attention"
    summary: ClassVar[str] = "Keys and values are raw slices of the states"

    def make_projections(self, shape: AttentionShape) -> None:
        """Queries and output."""
        self.q_proj = nn.Linear(shape.dim, shape.dim, bias=shape.bias)
        self.o_proj = nn.Linear(shape.dim, shape.dim, bias=shape.bias)

    def project(self, hidden: torch.Tensor) -> Triple:
        """Queries, and slices as keys and as values."""
        return self.split(self.q_proj(hidden)), self.split(hidden), self.split(hidden)


class SuperAttention(EfficientAttention):
    """Efficient attention whose values are first mixed between tokens by a learned ``[max_len, max_len]`` matrix.

    ``H = softmax(Q K^T / sqrt(head_dim)) (W_A V)``; lower-triangular where causal, rows and columns of padding left
    out. ``W_A`` starts as the identity, which is :class:`EfficientAttention`.

    Args:
        shape: widths.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        max_len: most tokens of a text.

    Raises:
        InputError: a longer text.

    Source:
        super-attention, "super".

    Example:
        >>> import torch
        >>> SuperAttention(AttentionShape(32, 4), max_len=16)(torch.randn(1, 9, 32)).shape
        torch.Size([1, 9, 32])
    """

    name: ClassVar[str] = "super-attention"
    summary: ClassVar[str] = "Raw slices, and values mixed between tokens by a learned matrix"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        max_len: int = 1024,
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        if max_len < 1:
            raise InputError(f"max_len={max_len} was given; expected a number of tokens from 1.")
        self.align = nn.Parameter(torch.eye(max_len))

    def mix(self, weights: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads of weights and values that were mixed between tokens first."""
        places = call.k_positions
        if places.shape[1] > len(self.align):
            raise InputError(
                f"{places.shape[1]} tokens were given to a SuperAttention of max_len={len(self.align)}; its matrix "
                "between tokens has that size: make the layer with a larger max_len, or cut the text."
            )
        align = self.align[places[:, :, None], places[:, None, :]]
        if call.causal:
            align = align.masked_fill(places[:, None, :] > places[:, :, None], 0.0)
        if call.padding is not None:
            align = align.masked_fill(~call.padding[:, None, :], 0.0)
        return weights @ (align[:, None].to(v.dtype) @ repeat_groups(v, weights.shape[1]))
