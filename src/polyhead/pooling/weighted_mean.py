"""The mean of the token states, later tokens weighing more."""

from __future__ import annotations

from torch import Tensor

from polyhead.pooling.base import Pooler, weighted_sum

__all__ = ["WeightedMeanPooler"]


class WeightedMeanPooler(Pooler):
    """Position-weighted mean ``sum_t t x_t / sum_t t`` for causal models, whose later tokens have seen more.

    ``t`` counts from 1 at the text's first token, also where a prompt in front is left out of the sum
    (SGPT, arXiv 2202.08904, equation 2).
    """

    stock = "weightedmean"

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`."""
        weights = counted.to(states.dtype) * positions.to(states.dtype)
        return weighted_sum(states, weights) / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
