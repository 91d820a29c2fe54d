"""Add a vector to each head's output."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from polyhead.act.vectors import Heads, Positions, VectorAction

__all__ = ["Steer"]


class Steer(VectorAction):
    """Head output plus ``strength`` times the head's vector: ``z_h <- z_h + s v_h``.

    Args:
        vectors: ``[layers, heads, head_dim]``; a tensor that requires gradients is learned through.
        strength: one number for all heads; 0 changes nothing.
        heads: which heads; None for all.
        positions: which tokens, see :class:`VectorAction`.

    Example:
        >>> import polyhead, torch
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> vectors = torch.zeros(model.layers, model.heads, model.head_dim)
        >>> vectors[5, 3] = 1.0
        >>> with Steer(vectors, strength=2.0).on(model), torch.no_grad():
        ...     _ = model(**model.tokenize(["a push in one head"]))
    """

    name: ClassVar[str] = "steer"
    summary: ClassVar[str] = "add a vector to each head's output"

    def __init__(
        self,
        vectors: np.ndarray | torch.Tensor,
        strength: float = 1.0,
        heads: Heads = None,
        positions: Positions = "all",
    ) -> None:
        super().__init__(vectors, heads, positions)
        self.strength = strength

    def altered(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """See :class:`VectorAction`."""
        return heads + self.strength * self.vector(layer, heads)
