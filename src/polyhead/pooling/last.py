"""The state of the last token."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.pooling.base import Pooler, state_at

__all__ = ["LastPooler"]


class LastPooler(Pooler):
    """State of a text's last token, the only one that has seen the whole text in a causal model."""

    stock = "lasttoken"

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`."""
        # The position times "counts" is largest at the last token that counts, whatever side the padding is on.
        return state_at(states, (positions * counted.to(positions.dtype)).to(torch.int32).argmax(dim=1), counted)
