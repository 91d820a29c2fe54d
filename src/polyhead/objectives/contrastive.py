"""Contrastive loss with a margin on each side (Hadsell et al. 2006)."""

from __future__ import annotations

from torch import Tensor

from polyhead.objectives.base import Loss, Reduction, Terms
from polyhead.objectives.relation import Relation

__all__ = ["ContrastiveLoss"]


class ContrastiveLoss(Loss):
    """``max(0, pos_margin - s)`` for positives plus ``max(0, s - neg_margin)`` for negatives, each a mean of its own.

    Args:
        pos_margin: positives at least as similar cost nothing.
        neg_margin: negatives at most as similar cost nothing.
        reduction: "nonzero" by default, as in pytorch-metric-learning.
    """

    def __init__(self, *, pos_margin: float = 1.0, neg_margin: float = 0.0, reduction: Reduction = "nonzero") -> None:
        super().__init__(reduction=reduction)
        self.pos_margin = pos_margin
        self.neg_margin = neg_margin

    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """See :class:`Loss`."""
        return [
            Terms((self.pos_margin - similarity).relu(), relation.positive),
            Terms((similarity - self.neg_margin).relu(), relation.negative),
        ]
