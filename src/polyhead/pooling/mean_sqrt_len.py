"""The sum of the token states over the square root of their number."""

from __future__ import annotations

from torch import Tensor

from polyhead.pooling.base import Pooler, weighted_sum

__all__ = ["MeanSqrtLenPooler"]


class MeanSqrtLenPooler(Pooler):
    """``sum_t m_t x_t / sqrt(sum_t m_t)``: longer texts keep a longer vector than under the mean."""

    stock = "mean_sqrt_len_tokens"

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`."""
        weights = counted.to(states.dtype)
        return weighted_sum(states, weights) / weights.sum(dim=1, keepdim=True).clamp(min=1e-9).sqrt()
