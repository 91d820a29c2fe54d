"""Losses against one learned vector a class: proxy-NCA and proxy-anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.objectives.base import Loss, Miner, Objective, Regularizer, Terms, weighted_logsumexp
from polyhead.objectives.relation import Relation
from polyhead.objectives.similarity import Similarity
from polyhead.objectives.triplet import SquaredUnitEuclidean

__all__ = ["ProxyAnchorLoss", "ProxyNCALoss", "ProxyObjective"]


class ProxyObjective(Objective):
    """An objective whose others are learned proxies, one a class: cost grows with classes, not with the batch squared.

    Args:
        loss: any; its columns are classes.
        classes: how many.
        dim: of the embeddings.
        similarity, miners, regularizers: see :class:`Objective`.
        seed: of the proxies' start: normal, of length about 1.

    The proxies are a parameter: give ``objective.parameters()`` to the optimiser too, usually at a higher rate.

    Example:
        >>> import torch
        >>> from polyhead.objectives import ProxyAnchorLoss, ProxyObjective
        >>> objective = ProxyObjective(ProxyAnchorLoss(), classes=3, dim=8)
        >>> objective(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).shape, objective.proxies.shape
        (torch.Size([]), torch.Size([3, 8]))
    """

    def __init__(
        self,
        loss: Loss,
        classes: int,
        dim: int,
        similarity: Similarity | None = None,
        miners: Sequence[Miner] = (),
        regularizers: Sequence[Regularizer] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(loss, similarity, miners, regularizers)
        start = torch.randn(classes, dim, generator=torch.Generator().manual_seed(seed)) / dim**0.5
        self.proxies = nn.Parameter(start)

    def forward(
        self, embeddings: Tensor, relation: Relation | Tensor | None = None, other: Tensor | None = None
    ) -> Tensor:
        """The objective of a batch.

        Args:
            embeddings: ``[n, d]``.
            relation: ``[n]`` integer labels below ``classes``, or a :class:`Relation` ``[n, classes]``.
            other: must be None: the proxies take its place.
        """
        if relation is None or other is not None:
            raise InputError("A proxy objective takes embeddings and labels; the proxies are the others.")
        if isinstance(relation, Tensor):
            classes = len(self.proxies)
            if relation.is_floating_point() or bool(((relation < 0) | (relation >= classes)).any()):
                raise InputError(f"Labels must be whole numbers from 0 to {classes - 1}, one a proxy.")
            relation = Relation.from_labels(relation, torch.arange(classes, device=relation.device))
        return super().forward(embeddings, relation, self.proxies.to(embeddings.dtype))


class ProxyNCALoss(Loss):
    """``-log(sum_p e^{s_p / t} / sum_c e^{s_c / t})`` over an anchor's columns (proxy-NCA, arXiv 1703.07464).

    Args:
        temperature: ``t``.
        among_all: the denominator holds positives as well (a softmax, as in pytorch-metric-learning and proxy-NCA++);
            False: negatives only, as first published.
    """

    similarity: ClassVar[type[Similarity]] = SquaredUnitEuclidean

    def __init__(self, *, temperature: float = 1.0, among_all: bool = True) -> None:
        super().__init__()
        self.temperature = temperature
        self.among_all = among_all

    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """See :class:`Loss`."""
        logits = similarity / self.temperature
        below = relation.positive + relation.negative if self.among_all else relation.negative
        counts = relation.is_positive.any(1) & (below > 0).any(1)
        own = weighted_logsumexp(logits, relation.positive).masked_fill(~counts, 0.0)
        every = weighted_logsumexp(logits, below).masked_fill(~counts, 0.0)
        return [Terms(every - own, counts)]


class ProxyAnchorLoss(Loss):
    """Columns are anchors: ``mean_c log(1 + sum_p e^{-a (s - m)}) + mean_c log(1 + sum_n e^{a (s + m)})`` (2003.13911).

    The first mean is over classes in the batch, the second over all classes.

    Args:
        alpha: ``a``, sharpness.
        margin: ``m``.
    """

    def __init__(self, *, alpha: float = 32.0, margin: float = 0.1) -> None:
        super().__init__()
        self.alpha = alpha
        self.margin = margin

    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """See :class:`Loss`."""
        near = weighted_logsumexp(-self.alpha * (similarity - self.margin), relation.positive, 0, one=True)
        far = weighted_logsumexp(self.alpha * (similarity + self.margin), relation.negative, 0, one=True)
        return [Terms(near, relation.is_positive.any(0)), Terms(far, torch.ones_like(far))]
