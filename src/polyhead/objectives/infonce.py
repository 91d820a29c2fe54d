"""InfoNCE, also called multiple negatives, NT-Xent or, with labels, supervised contrastive loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.objectives.base import Loss, Terms, weighted_logsumexp
from polyhead.objectives.relation import Relation
from polyhead.papers import paper

__all__ = ["InfoNCE"]


@paper("kalm-embedding-v2")
class InfoNCE(Loss):
    """``-log(e^{s_p / t} / (e^{s_p / t} + sum_n e^{s_n / t}))`` of every positive pair (arXiv 1807.03748).

    Args:
        temperature: ``t``; sentence-transformers' ``scale`` is one divided by it.
        positives: "apart": each positive stands in the denominator with the negatives alone (NT-Xent; each positive
            pair is a term). "together": all positives of the anchor stand in it (SupCon, arXiv 2004.11362; each
            anchor is a term, the mean over its positives).
        gamma: each term times ``(1 - p)^gamma``, ``p`` its softmax: hard anchors weigh more, and the weight carries a
            gradient of its own (focal reweighting, paper kalm-embedding-v2; 0: none).

    Anchors without a positive are left out of the mean. Anchors without a negative give 0 (apart).

    Example:
        >>> import torch
        >>> from polyhead.objectives import InfoNCE, Relation
        >>> similarity = torch.tensor([[0.9, 0.1], [0.3, 0.8]])
        >>> round(InfoNCE(temperature=0.1)(similarity, Relation.diagonal(2)).item(), 5)
        0.00353
    """

    def __init__(
        self, *, temperature: float = 0.05, positives: Literal["apart", "together"] = "apart", gamma: float = 0.0
    ) -> None:
        super().__init__()
        if temperature <= 0 or gamma < 0 or positives not in ("apart", "together"):
            raise InputError(
                f"temperature {temperature}, gamma {gamma} and positives {positives!r}: expected a temperature above "
                "0, gamma at least 0, and 'apart' or 'together'."
            )
        self.temperature = temperature
        self.positives = positives
        self.gamma = gamma

    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """See :class:`Loss`."""
        logits = similarity / self.temperature
        weights = relation.positive.to(logits.dtype)
        if self.positives == "apart":
            against = weighted_logsumexp(logits, relation.negative)
            values = nn.functional.softplus(against[:, None] - logits)
        else:
            values = weighted_logsumexp(logits, relation.positive + relation.negative)[:, None] - logits
            count = weights.sum(1, keepdim=True)
            weights = weights / torch.where(count > 0, count, torch.ones_like(count))
        values = torch.where(relation.is_positive, values, torch.zeros_like(values))
        if self.gamma:
            values = values * (-torch.expm1(-values)).clamp(min=1e-12) ** self.gamma  # no infinite slope at p = 1
        return [Terms(values, weights)]
