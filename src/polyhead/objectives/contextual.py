"""Contextual loss: neighbours in common, made differentiable straight through a step (paper contextual-loss)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyhead.errors import InputError
from polyhead.objectives.base import Loss, Terms
from polyhead.objectives.relation import Relation
from polyhead.papers import paper

__all__ = ["ContextualLoss", "contextual_similarity"]

_SLOPE = 20.0  # of the step, in cosine: the paper's 10 in squared distance, which is 2 - 2 cosine


class _Step(torch.autograd.Function):
    """1 at or above 0, else 0; backward a constant slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * _SLOPE


@paper("contextual-loss")
def contextual_similarity(similarity: Tensor, k: int, *, epsilon: float = 0.05) -> Tensor:
    """How much the neighbourhoods of two vectors overlap; useful as a re-ranking score as well.

    ``N`` is each row's ``k`` nearest, itself among them, and all within ``epsilon`` (of squared distance) of the last.
    For neighbours the overlap is half the share of neighbours in common and half the share of others in common; it is
    averaged over reciprocal ``k / 2`` neighbours, and over both directions.

    Args:
        similarity: ``[n, n]`` cosines of vectors with themselves.
        k: from 2 to n.
        epsilon: slack.

    Returns:
        ``[n, n]`` symmetric, 0 to 1. Gradients pass the steps as if they had a constant slope.

    Example:
        >>> import torch
        >>> from polyhead.objectives import contextual_similarity
        >>> cosine = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
        >>> contextual_similarity(cosine, 2).tolist()[0]
        [1.0, 1.0, 0.0, 0.0]
    """
    n = len(similarity)
    if similarity.shape != (n, n) or not 2 <= k <= n:
        raise InputError(
            f"Similarities {list(similarity.shape)} and k {k}: expected [n, n] of a batch with itself, k of 2 to n."
        )
    nearest = similarity.detach().topk(k, 1).values
    near = _neighbours(similarity, nearest[:, -1:], epsilon)
    far = 1 - near
    shared = near @ near.T / near.sum(1, keepdim=True).detach()
    others = far.sum(1, keepdim=True).detach()
    apart = far @ far.T / torch.where(others > 0, others, torch.ones_like(others))
    overlap = 0.5 * (shared + apart) * near
    half = _neighbours(similarity, nearest[:, k // 2 - 1 : k // 2], epsilon)
    mutual = half * half.T
    count = mutual.sum(1, keepdim=True)
    averaged = mutual @ overlap / torch.where(count > 0, count, torch.ones_like(count))
    return 0.5 * (averaged + averaged.T)


def _neighbours(similarity: Tensor, last: Tensor, epsilon: float) -> Tensor:
    stepped: Tensor = _Step.apply(similarity - last + epsilon / 2)
    return stepped


@paper("contextual-loss")
class ContextualLoss(Loss):
    """``(1 - share) context + share contrast + regularize (mean similarity - target)^2`` (paper contextual-loss).

    Context is the mean over pairs of ``(1 - W)^2`` for positives and ``W^2`` for negatives, ``W`` the contextual
    similarity; contrast is a contrastive loss over pairs that break its margins. It wants cosines of a batch with
    itself (``other=None``), balanced: ``k`` of each class.

    Args:
        k: neighbours, about the vectors a class has in a batch.
        epsilon: slack of neighbourhoods, in squared distance.
        share: of the contrastive loss.
        pos_margin, neg_margin: of the contrastive loss, in cosine.
        regularize: weight of the last term.
        target: mean similarity wanted.

    Example:
        >>> import torch
        >>> from polyhead.objectives import ContextualLoss, Objective
        >>> vectors = torch.eye(2).repeat_interleave(3, 0)
        >>> Objective(ContextualLoss(k=3))(vectors, torch.tensor([0, 0, 0, 1, 1, 1])).item()
        0.0
    """

    def __init__(
        self,
        *,
        k: int = 4,
        epsilon: float = 0.05,
        share: float = 0.4,
        pos_margin: float = 0.75,
        neg_margin: float = 0.6,
        regularize: float = 0.0,
        target: float = 0.3,
    ) -> None:
        super().__init__()
        self.k = k
        self.epsilon = epsilon
        self.share = share
        self.margins = (pos_margin, neg_margin)
        self.regularize = regularize
        self.target = target

    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """See :class:`Loss`."""
        n = len(similarity)
        context = contextual_similarity(similarity, min(self.k, n), epsilon=self.epsilon)
        positive, negative = relation.positive.to(similarity.dtype), relation.negative.to(similarity.dtype)
        wrong = ((1 - context).square() * positive + context.square() * negative).sum(1) / n
        close, far = (self.margins[0] - similarity).relu(), (similarity - self.margins[1]).relu()
        spread = (similarity.mean() - self.target).square()[None]
        return [
            Terms((1 - self.share) * wrong, torch.ones_like(wrong)),
            Terms(self.share * close, positive * (close.detach() > 0)),
            Terms(self.share * far, negative * (far.detach() > 0)),
            Terms(self.regularize * spread, torch.ones_like(spread)),
        ]
