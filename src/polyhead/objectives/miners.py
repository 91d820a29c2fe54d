"""Miners that any loss takes: likely false negatives out, the hardest negatives only."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.errors import InputError
from polyhead.objectives.base import Miner
from polyhead.objectives.relation import Relation

__all__ = ["FalseNegativeMask", "HardestNegatives"]


class FalseNegativeMask(Miner):
    """Ignores negatives so close to the anchor that they are likely to be positives nobody marked.

    Args:
        margin: ignore a negative with similarity above the anchor's least similar positive plus this; None: off.
        above: ignore a negative with similarity above this; None: off.

    Example:
        >>> import torch
        >>> from polyhead.objectives import FalseNegativeMask, Relation
        >>> similarity = torch.tensor([[0.7, 0.9], [0.1, 0.8]])
        >>> FalseNegativeMask(margin=0.1)(similarity, Relation.diagonal(2)).negative.int().tolist()
        [[0, 0], [1, 0]]
    """

    def __init__(self, *, margin: float | None = None, above: float | None = None) -> None:
        super().__init__()
        if margin is None and above is None:
            raise InputError("Nothing to mask by: give margin (beside the positive), above (a similarity), or both.")
        self.margin = margin
        self.above = above

    def forward(self, similarity: Tensor, relation: Relation) -> Relation:
        """See :class:`Miner`."""
        keep = torch.ones_like(similarity, dtype=torch.bool)
        if self.margin is not None:
            least = similarity.masked_fill(~relation.is_positive, torch.inf).amin(1, keepdim=True)
            keep &= similarity <= least + self.margin
        if self.above is not None:
            keep &= similarity <= self.above
        return relation.only(negative=keep)


class HardestNegatives(Miner):
    """Keeps the ``k`` negatives most similar to each anchor.

    Args:
        k: how many.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise InputError(f"k is {k}, expected at least 1 negative an anchor.")
        self.k = k

    def forward(self, similarity: Tensor, relation: Relation) -> Relation:
        """See :class:`Miner`."""
        among = similarity.masked_fill(~relation.is_negative, -torch.inf)
        best = among.topk(min(self.k, among.shape[1]), dim=1).indices
        return relation.only(negative=torch.zeros_like(among, dtype=torch.bool).scatter_(1, best, True))
