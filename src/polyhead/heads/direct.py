"""What heads write, summed over tokens before it is written: the pooling of direct contributions, made cheap.

A norm with its statistics held fixed is ``token * fixed(u)``: a number for each token times a map that all tokens
share. So a weighted sum over tokens goes through any chain of norms in head space, and nothing of
``[batch, tokens, heads, hidden]`` is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch

from polyhead.heads.residual import TokenScale

__all__ = ["fixed_back", "fixed_through", "pooled_states", "pooled_writes", "token_weights"]


def token_weights(scales: Sequence[TokenScale], pool: torch.Tensor) -> torch.Tensor:
    """``pool [batch, tokens]`` times the factors of the norms that each token passes; 0 where the pool is 0."""
    found = reduce(lambda weights, scale: weights * scale.token[..., 0], scales, pool)
    return torch.where(pool == 0, torch.zeros_like(found), found)  # padding may be NaN


def fixed_through(scales: Sequence[TokenScale], vectors: torch.Tensor) -> torch.Tensor:
    """Vectors ``[..., hidden]`` through the shared part of norms, in their order; biases left out."""
    return reduce(lambda found, scale: scale.fixed(found), scales, vectors)


def fixed_back(scales: Sequence[TokenScale], directions: torch.Tensor) -> torch.Tensor:
    """The transpose of :func:`fixed_through`: ``fixed_through(v) . d == v . fixed_back(d)``."""

    def back(found: torch.Tensor, scale: TokenScale) -> torch.Tensor:
        weighted = scale.weight * found
        return weighted - weighted.mean(-1, keepdim=True) if scale.centers else weighted

    return reduce(back, reversed(scales), directions)


def pooled_states(states: torch.Tensor, scales: Sequence[TokenScale], pool: torch.Tensor) -> torch.Tensor:
    """``sum_t pool_t N(states_t)`` of ``states [batch, tokens, ...]`` before their norms' fixed part is taken.

    Args:
        states: token states or head outputs; rows of no weight may hold anything, NaN too.
        scales: norms on the way, in order.
        pool: ``[batch, tokens]``.

    Returns:
        ``[batch, ...]``.
    """
    weights = token_weights(scales, pool)
    flat = states.flatten(2).masked_fill((pool == 0)[..., None], 0)
    return torch.einsum("bt,bti->bi", weights, flat).unflatten(1, states.shape[2:])


def pooled_writes(
    z: torch.Tensor, weight: torch.Tensor, scales: Sequence[TokenScale], pool: torch.Tensor
) -> torch.Tensor:
    """What each head writes, through norms held fixed and summed over tokens: ``[batch, heads, hidden]``.

    Args:
        z: head outputs ``[batch, tokens, heads, head_dim]``.
        weight: ``W_O``, ``[heads, head_dim, hidden]``.
        scales: norms between the output projection and where it is read, in order.
        pool: ``[batch, tokens]``, the weight of each token.
    """
    mixed = pooled_states(z, scales, pool)
    return fixed_through(scales, torch.einsum("bhd,hdo->bho", mixed, weight.to(mixed.dtype)))
