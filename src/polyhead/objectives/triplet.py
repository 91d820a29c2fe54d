"""Triplet loss and the online mining of triplets (paper facenet)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.objectives.base import Loss, Miner, Reduction, Terms
from polyhead.objectives.relation import Relation
from polyhead.objectives.similarity import EuclideanSimilarity, Similarity
from polyhead.papers import paper

__all__ = ["SquaredUnitEuclidean", "TripletLoss", "TripletMiner"]


class SquaredUnitEuclidean(EuclideanSimilarity):
    """Minus the squared distance of unit vectors: FaceNet's."""

    def __init__(self) -> None:
        super().__init__(squared=True, normalize=True)


@paper("facenet")
class TripletLoss(Loss):
    """``max(0, s(a, n) - s(a, p) + margin)`` over triplets of anchor, positive and negative (paper facenet, eq. 2).

    The triplets are those a :class:`TripletMiner` chose, else all of the relation. Memory: positive pairs times
    columns where all are taken.

    Args:
        margin: by which a negative has to be farther than a positive, in units of the similarity.
        smooth: softplus in place of the hinge.
        reduction: "mean" over triplets; "nonzero" over those that break the margin.

    Example:
        >>> import torch
        >>> from polyhead.objectives import Objective, TripletLoss, TripletMiner
        >>> objective = Objective(TripletLoss(margin=0.2), miners=[TripletMiner("semihard", margin=0.2)])
        >>> vectors = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]])
        >>> round(objective(vectors, torch.tensor([0, 0, 1])).item(), 2)
        0.26
    """

    similarity: ClassVar[type[Similarity]] = SquaredUnitEuclidean

    def __init__(self, *, margin: float = 0.2, smooth: bool = False, reduction: Reduction = "mean") -> None:
        super().__init__(reduction=reduction)
        self.margin = margin
        self.smooth = smooth

    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """See :class:`Loss`."""
        positive, negative = relation.positive.to(similarity.dtype), relation.negative.to(similarity.dtype)
        if relation.triplets is not None:
            a, p, n = relation.triplets.T
            violation = similarity[a, n] - similarity[a, p] + self.margin
            weights = positive[a, p] * negative[a, n]
        else:
            a, p = relation.is_positive.nonzero(as_tuple=True)
            violation = similarity[a] - similarity[a, p][:, None] + self.margin
            weights = positive[a, p][:, None] * negative[a]
            violation = torch.where(weights > 0, violation, torch.zeros_like(violation))
        return [Terms(nn.functional.softplus(violation) if self.smooth else violation.relu(), weights)]


@paper("facenet")
class TripletMiner(Miner):
    """Chooses triplets of a batch (paper facenet, section 3.2).

    Args:
        kind: "semihard": the negative is farther than the positive; "hard": it is nearer or as near; "violating":
            either; "random": any.
        margin: a triplet counts only if its negative is within this of its positive ("random" takes any).
        one: one negative for every positive pair: the nearest of its kind (the hardest, or nearest semi-hard). Where
            there is no semi-hard one at all, the farthest negative, so that each pair stays in the loss (as in the
            usual implementations); margin is not looked at for it. False: all of the kind.
        seed: of "random" with ``one``.

    Losses that are not of triplets see the pairs that are in some triplet.
    """

    def __init__(
        self,
        kind: Literal["semihard", "hard", "violating", "random"] = "semihard",
        *,
        margin: float = 0.2,
        one: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if kind not in ("semihard", "hard", "violating", "random"):
            raise InputError(f"kind is {kind!r}, expected 'semihard', 'hard', 'violating' or 'random'.")
        self.kind = kind
        self.margin = margin
        self.one = one
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, similarity: Tensor, relation: Relation) -> Relation:
        """See :class:`Miner`."""
        a, p = relation.is_positive.nonzero(as_tuple=True)
        gap = similarity[a, p][:, None] - similarity[a]  # [pairs, m], how much farther the column is than the positive
        among = relation.is_negative[a]
        fits = among & self._of_kind(gap, loose=self.one)
        if not self.one:
            pair, n = fits.nonzero(as_tuple=True)
        else:
            chance = self.kind == "random"
            order = torch.rand(gap.shape, generator=self._generator).to(gap) if chance else similarity[a]
            if self.kind == "semihard":
                none = ~fits.any(1, keepdim=True)
                fits = fits | (among & none)
                order = torch.where(none, -order, order)
            pair = fits.any(1).nonzero(as_tuple=True)[0]
            n = order.masked_fill(~fits, -torch.inf)[pair].argmax(1)
        triplets = torch.stack((a[pair], p[pair], n), 1)
        used = [torch.zeros_like(similarity, dtype=torch.bool) for _ in range(2)]
        used[0][triplets[:, 0], triplets[:, 1]] = True
        used[1][triplets[:, 0], triplets[:, 2]] = True
        found = relation.only(*used)
        return Relation(found.positive, found.negative, found.grades, triplets, found.paired)

    def _of_kind(self, gap: Tensor, *, loose: bool) -> Tensor:
        if self.kind == "random":
            return torch.ones_like(gap, dtype=torch.bool)
        if self.kind == "semihard":
            return (gap > 0) if loose else (gap > 0) & (gap <= self.margin)
        return gap <= (0.0 if self.kind == "hard" else self.margin)
