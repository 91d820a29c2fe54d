"""Multi-similarity loss and mining, and the pair weights of any loss (paper multi-similarity)."""

from __future__ import annotations

import torch
from torch import Tensor

from polyhead.errors import InputError
from polyhead.objectives.base import Loss, Miner, Terms, weighted_logsumexp
from polyhead.objectives.relation import Relation
from polyhead.papers import paper

__all__ = ["MultiSimilarityLoss", "MultiSimilarityMiner", "pair_weights"]


@paper("multi-similarity")
class MultiSimilarityLoss(Loss):
    """``1/a log(1 + sum_p e^{-a (s_p - base)}) + 1/b log(1 + sum_n e^{b (s_n - base)})`` an anchor (eq. 15).

    Args:
        alpha, beta: ``a`` and ``b``, how much the hardest positives and negatives stand out.
        base: similarity around which pairs begin to matter; the paper's text has 1, its code and most others 0.5.

    Example:
        >>> import torch
        >>> from polyhead.objectives import MultiSimilarityLoss, MultiSimilarityMiner, Objective
        >>> objective = Objective(MultiSimilarityLoss(), miners=[MultiSimilarityMiner(epsilon=0.1)])
        >>> vectors = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
        >>> round(objective(vectors, torch.tensor([0, 0, 1])).item(), 3)
        0.459
    """

    def __init__(self, *, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5) -> None:
        super().__init__()
        if alpha <= 0 or beta <= 0:
            raise InputError(f"alpha {alpha} and beta {beta}: expected both above 0.")
        self.alpha = alpha
        self.beta = beta
        self.base = base

    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """See :class:`Loss`."""
        above = similarity - self.base
        near = weighted_logsumexp(-self.alpha * above, relation.positive, one=True) / self.alpha
        far = weighted_logsumexp(self.beta * above, relation.negative, one=True) / self.beta
        return [Terms(near + far, torch.ones_like(near))]


@paper("multi-similarity")
class MultiSimilarityMiner(Miner):
    """Keeps negatives closer than the farthest positive, and positives farther than the closest negative (eq. 11-12).

    An anchor without a positive keeps no negative, and the other way round.

    Args:
        epsilon: slack, in units of the similarity.
    """

    def __init__(self, epsilon: float = 0.1) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, similarity: Tensor, relation: Relation) -> Relation:
        """See :class:`Miner`."""
        farthest = similarity.masked_fill(~relation.is_positive, torch.inf).amin(1, keepdim=True)
        closest = similarity.masked_fill(~relation.is_negative, -torch.inf).amax(1, keepdim=True)
        return relation.only(similarity - self.epsilon < closest, similarity + self.epsilon > farthest)


@paper("multi-similarity")
def pair_weights(loss: Loss, similarity: Tensor, relation: Relation) -> Tensor:
    """How much a loss pulls at each pair: its gradient in the similarities (the paper's general pair weighting).

    Args:
        loss: any.
        similarity: ``[n, m]``.
        relation: of its pairs.

    Returns:
        ``[n, m]`` derivative of the loss: negative where it wants the pair closer. Its size is the paper's weight.

    Example:
        >>> import torch
        >>> from polyhead.objectives import InfoNCE, Relation, pair_weights
        >>> pair_weights(InfoNCE(temperature=1.0), torch.zeros(2, 2), Relation.diagonal(2)).tolist()
        [[-0.25, 0.25], [0.25, -0.25]]
    """
    given = similarity.detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(given, relation), given)
    return gradient
