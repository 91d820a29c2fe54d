"""The state of the first token."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.pooling.base import Pooler, state_at

__all__ = ["ClsPooler"]


class ClsPooler(Pooler):
    """State of a text's first token that counts, which BERT-like models train as a summary ([CLS])."""

    stock = "cls"

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`."""
        return state_at(states, counted.to(torch.int32).argmax(dim=1), counted)
