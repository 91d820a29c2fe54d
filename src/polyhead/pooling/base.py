"""What every pooler is: token states and a mask in, one vector per text out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ConcatenatedPooler", "Pooler"]


class Pooler(nn.Module):
    """Pools token states ``[batch, tokens, dim]`` into ``[batch, dim]``, padded on either side.

    A pooler has no weights unless its paper gives it some, keeps the batch order, and computes in float32 where the
    states are in half precision, because sums over hundreds of tokens lose digits there.
    """

    def forward(self, states: Tensor, mask: Tensor, skip: int | Tensor = 0) -> Tensor:
        """Pool a batch.

        Args:
            states: ``[batch, tokens, dim]``.
            mask: ``[batch, tokens]``, 1 for tokens and 0 for padding, which may stand left or right.
            skip: how many real tokens at the start of each text to leave out (a prompt that must not be pooled).

        Returns:
            ``[batch, dim]``, float32 or wider. A text without a token that counts gives zeros.
        """
        if states.dtype in (torch.float16, torch.bfloat16):
            states = states.float()
        positions = token_positions(mask)
        counted = (mask != 0) & (positions > skip)
        return self.pool(states, counted, positions)

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """The pooling itself.

        Args:
            states: ``[batch, tokens, dim]``.
            counted: ``[batch, tokens]`` bool, the tokens to pool.
            positions: ``[batch, tokens]``, 1 for the first real token of each text; 0 or less on left padding.
        """
        raise NotImplementedError


class ConcatenatedPooler(Pooler):
    """Several poolings side by side, in the order given: ``[batch, dim * poolers]``."""

    def __init__(self, poolers: Sequence[Pooler]) -> None:
        super().__init__()
        self.poolers = nn.ModuleList(poolers)

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`."""
        return torch.cat([pooler.pool(states, counted, positions) for pooler in self.poolers], dim=-1)  # type: ignore[operator]


def token_positions(mask: Tensor) -> Tensor:
    """Positions ``[batch, tokens]`` counted from 1 at each text's first real token."""
    index = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    padding_before = (mask != 0).to(torch.int32).argmax(dim=1)
    return index.unsqueeze(0) - padding_before.unsqueeze(1)


def weighted_sum(states: Tensor, weights: Tensor) -> Tensor:
    """Sum over tokens of ``states [batch, tokens, dim]`` times ``weights [batch, tokens]``: ``[batch, dim]``."""
    return (states * weights.unsqueeze(-1)).sum(dim=1)


def state_at(states: Tensor, index: Tensor, counted: Tensor) -> Tensor:
    """States ``[batch, dim]`` at one token index a text (``index [batch]``); zeros where no token counts."""
    picked = states.gather(1, index.view(-1, 1, 1).expand(-1, 1, states.shape[-1])).squeeze(1)
    return picked * counted.any(dim=1, keepdim=True).to(states.dtype)
