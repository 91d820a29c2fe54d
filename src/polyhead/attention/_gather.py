"""Picking tokens by head: what the mechanisms that choose what to attend to have in common."""

from __future__ import annotations

import torch

__all__ = ["take", "to_front"]


def take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens of each head: ``[batch, heads, tokens, features]`` by ``[batch, heads, ...]`` -> ``[..., features]``."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, states.shape[-1])
    return states.gather(2, flat).unflatten(2, index.shape[2:])


def to_front(padding: torch.Tensor) -> torch.Tensor:
    """``[batch, tokens]`` order that puts real tokens first and keeps their order; its argsort leads back."""
    return (~padding).long().argsort(dim=1, stable=True)
