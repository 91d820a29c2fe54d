"""Rotary positions: pairs of features turn by an angle that grows with the place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from polyhead.errors import InputError

if TYPE_CHECKING:
    from polyhead.attention.call import Call

__all__ = ["RotaryPositions", "rotate"]


def rotate(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn pairs ``(i, i + head_dim / 2)`` of features by angles.

    Args:
        states: ``[batch, heads, tokens, head_dim]``.
        angles: ``[batch or 1, heads or 1, tokens, head_dim / 2]`` in radians.

    Returns:
        The shape and dtype of ``states``.
    """
    first, second = states.chunk(2, -1)
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class RotaryPositions(nn.Module):
    """Rotary position embedding (Su et al. 2021, equation 15), as transformers lays out its pairs.

    Args:
        head_dim: features of a head, even.
        base: pair ``i`` turns by ``base ** (-2 i / head_dim)`` radians a token.

    Raises:
        InputError: an odd number of features.

    Example:
        >>> import torch
        >>> from polyhead.attention import Attention, AttentionShape
        >>> layer = Attention(AttentionShape(32, 4), causal=True, positions=RotaryPositions(8))
        >>> layer(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise InputError(f"Rotary positions for {head_dim} features were asked for; expected an even number.")
        self.head_dim = head_dim
        self.base = base

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """``[head_dim / 2]`` radians a token, in float64: not a buffer, since ``.to(bfloat16)`` would round them."""
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float64, device=device)
        return self.base ** (-pairs / self.head_dim)

    def forward(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, turned."""
        turned = []
        for states, places in ((q, call.q_positions), (k, call.k_positions)):
            angles = places[:, None, :, None].double() * self.frequencies(states.device)
            turned.append(rotate(states, angles))
        return turned[0], turned[1]
