"""CoSENT: pairs that people grade higher shall be more similar; with the angle similarity it is AnglE's loss."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.objectives.base import Loss, Terms
from polyhead.objectives.relation import Relation

__all__ = ["CoSENTLoss"]


class CoSENTLoss(Loss):
    """``log(1 + sum over pairs with grade_i > grade_j of e^{(s_j - s_i) / t})`` (CoSENT).

    Source: doi 10.1109/TASLP.2024.3402087. All graded pairs of the batch are compared, in
    ``n log n`` rather than ``n^2``. A relation without grades counts
    positives as 1 and negatives as 0. ``Objective(CoSENTLoss(), AngleSimilarity())`` is AnglE (arXiv 2309.12871).

    Args:
        temperature: ``t``; sentence-transformers' ``scale`` is one divided by it.

    Example:
        >>> import torch
        >>> from polyhead.objectives import CoSENTLoss, Objective
        >>> first, second = torch.eye(3), torch.eye(3).roll(1, 0) + torch.eye(3) * torch.tensor([0.0, 1.0, 5.0])
        >>> objective = Objective(CoSENTLoss(temperature=0.05))
        >>> round(objective(first, torch.tensor([0.0, 0.5, 1.0]), second).item(), 4)
        0.0042
    """

    def __init__(self, *, temperature: float = 0.05) -> None:
        super().__init__()
        self.temperature = temperature

    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """See :class:`Loss`."""
        grades = relation.as_grades()
        # A weight counts a pair that many times; ties of grade are never compared.
        weight = (relation.positive.to(similarity.dtype) + relation.negative.to(similarity.dtype)).ravel()
        known = ~grades.isnan().ravel() & (weight > 0)
        grades, order = grades.ravel()[known].sort()
        logits = (similarity.ravel()[known] / self.temperature)[order]
        weight = weight[known][order].log()
        higher = torch.searchsorted(grades, grades, right=True)
        tail = torch.logcumsumexp((weight - logits).flip(0), 0).flip(0)
        below = higher < len(grades)
        sums = (weight + logits)[below] + tail[higher[below]]
        value = torch.logsumexp(torch.cat((sums, sums.new_zeros(1))), 0)
        return [Terms(value[None], torch.ones_like(value)[None])]
