"""The largest value of each dimension over the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.pooling.base import Pooler

__all__ = ["MaxPooler"]


class MaxPooler(Pooler):
    """Maximum over a text's tokens, dimension by dimension."""

    stock = "max"

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`."""
        lowest = torch.finfo(states.dtype).min
        largest = states.masked_fill(~counted.unsqueeze(-1), lowest).amax(dim=1)
        return largest.masked_fill(~counted.any(dim=1, keepdim=True), 0.0)
