"""Fastmax: softmax with a Taylor polynomial in place of ``exp``, so that it factorises."""

from __future__ import annotations

from typing import ClassVar

import torch

from polyhead.attention.base import Positions
from polyhead.attention.call import AttentionShape
from polyhead.attention.linear import LinearAttention
from polyhead.attention.taylor import taylor_count, taylor_features
from polyhead.papers import paper

__all__ = ["FastmaxAttention", "standardized"]


def standardized(states: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """``[..., size]`` with mean 0 and variance 1 over the last axis."""
    states = states - states.mean(-1, keepdim=True)
    return states * torch.rsqrt(states.square().mean(-1, keepdim=True) + eps)


@paper("fastmax")
class FastmaxAttention(LinearAttention):
    """Weights ``f(q_i . k_j) / sum_j f(q_i . k_j)``, ``f(x) = 1 + x (+ x^2 / 2)``, of standardised queries and keys.

    ``weights`` is the dense form; a run takes the factored one, whose time grows with tokens.

    Args:
        shape: widths; None to serve a stock model's steps.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand; applied before standardising.
        order: 1 or 2; weights are surely positive with 2 only.
        standardize: whether every query and key gets mean 0 and variance 1 over its features.

    Raises:
        InputError: another order.

    Source:
        fastmax (Gerami et al. 2024, equations 5 to 12).

    Example:
        >>> layer = FastmaxAttention(AttentionShape(64, 4), causal=True)
        >>> layer(torch.randn(1, 9, 64)).shape, layer.feature_count()
        (torch.Size([1, 9, 64]), 153)
    """

    name: ClassVar[str] = "fastmax"
    summary: ClassVar[str] = "Softmax with a Taylor polynomial in place of exp, factorised"

    def __init__(
        self,
        shape: AttentionShape | None,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        order: int = 2,
        standardize: bool = True,
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        taylor_count(1, order)
        self.order, self.standardize = order, standardize

    def features(self, states: torch.Tensor, role: str) -> torch.Tensor:
        """Monomials of the standardised states."""
        return taylor_features(standardized(states) if self.standardize else states, self.order)

    def feature_count(self) -> int:
        """Monomials of a head."""
        return taylor_count(super().feature_count(), self.order)
