"""The mean of the token states."""

from __future__ import annotations

from torch import Tensor

from polyhead.pooling.base import Pooler, weighted_sum

__all__ = ["MeanPooler"]


class MeanPooler(Pooler):
    """Mean over a text's tokens: ``sum_t m_t x_t / sum_t m_t``."""

    stock = "mean"

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`."""
        weights = counted.to(states.dtype)
        return weighted_sum(states, weights) / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
