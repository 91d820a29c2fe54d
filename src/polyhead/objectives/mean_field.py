"""Pair losses in which the others of a class are replaced by their mean field, one vector a class."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from polyhead.objectives.base import Loss, Terms
from polyhead.objectives.proxies import ProxyObjective
from polyhead.objectives.relation import Relation
from polyhead.papers import paper

__all__ = [
    "MeanFieldContrastive",
    "MeanFieldContrastiveLoss",
    "MeanFieldMultiSimilarity",
    "MeanFieldMultiSimilarityLoss",
]


class MeanFieldContrastiveLoss(Loss):
    """``mean_i [relu(d(x_i, M_own) - pos_margin) + sum_other relu(neg_margin - d(x_i, M_c))]``, ``d = 1 - s``.

    Args:
        pos_margin, neg_margin: in cosine distance.
    """

    def __init__(self, *, pos_margin: float = 0.1, neg_margin: float = 0.7) -> None:
        super().__init__()
        self.pos_margin = pos_margin
        self.neg_margin = neg_margin

    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """See :class:`Loss`."""
        near = (1 - similarity - self.pos_margin).relu() * relation.positive
        far = (self.neg_margin - 1 + similarity).relu() * relation.negative
        values = (near + far).sum(1)
        return [Terms(values, torch.ones_like(values))]


class MeanFieldMultiSimilarityLoss(Loss):
    """Class-wise multi-similarity with mean fields, over columns that are classes.

    With ``p_c = mean_{i in c} e^{-a (s(x_i, M_c) - base)}`` and ``n_cc' = mean_{i in c} e^{b (s(x_i, M_c') - base)}``:
    ``1 / (a C) sum_c log(1 + p_c) + 1 / (2 b C) sum_{c != c'} log(1 + n_cc' + n_c'c)``, ``C`` classes in the batch.

    Args:
        alpha, beta: ``a`` and ``b``.
        base: similarity around which pairs begin to matter.
    """

    def __init__(self, *, alpha: float = 2.0, beta: float = 32.0, base: float = 0.5) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta
        self.base = base

    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """See :class:`Loss`."""
        above = similarity - self.base
        member = relation.positive.to(similarity.dtype)
        counts = member.sum(0)
        share = member / torch.where(counts > 0, counts, torch.ones_like(counts))
        near = (share * (-self.alpha * above).exp()).sum(0)
        far = share.T @ ((self.beta * above).exp() * relation.negative)
        present = (counts > 0).sum().clamp(min=1)
        # A class's own column holds negatives only where it was mixed; those belong to no pair of two classes.
        far = (far + far.T).masked_fill(torch.eye(len(far), dtype=torch.bool, device=far.device), 0.0)
        value = near.log1p().sum() / self.alpha + far.log1p().sum() / (2 * self.beta)
        return [Terms((value / present)[None], torch.ones_like(value)[None])]


class _MeanField(ProxyObjective):
    """Proxies as mean fields, with the term that keeps the fields consistent: apart from each other as classes are."""

    def __init__(self, loss: Loss, classes: int, dim: int, *, weight: float, power: float, seed: int) -> None:
        super().__init__(loss, classes, dim, seed=seed)
        self.weight = weight
        self.power = power

    @abstractmethod
    def overlap(self, similarity: Tensor) -> Tensor:
        """How much fields of some similarity ``[classes, classes]`` are too close."""

    def forward(
        self, embeddings: Tensor, relation: Relation | Tensor | None = None, other: Tensor | None = None
    ) -> Tensor:
        """See :class:`ProxyObjective`."""
        fields = self.proxies.to(embeddings.dtype)
        own = torch.eye(len(fields), dtype=torch.bool, device=fields.device)
        overlap = self.overlap(self.similarity(fields)).masked_fill(own, 0.0)
        return super().forward(embeddings, relation, other) + self.weight * overlap.pow(self.power).sum(1).mean()


@paper("mean-field-dml")
class MeanFieldContrastive(_MeanField):
    """Contrastive loss against learned mean fields: cost vectors times classes (paper mean-field-dml).

    Args:
        classes, dim, seed: see :class:`ProxyObjective`.
        pos_margin, neg_margin: in cosine distance.
        weight: of ``mean_c sum_c' relu(neg_margin - d(M_c, M_c'))^power``.
        power: of it.

    Example:
        >>> import torch
        >>> from polyhead.objectives import MeanFieldContrastive
        >>> MeanFieldContrastive(3, 8)(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).ndim
        0
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        *,
        pos_margin: float = 0.1,
        neg_margin: float = 0.7,
        weight: float = 1.0,
        power: float = 2.0,
        seed: int = 0,
    ) -> None:
        loss = MeanFieldContrastiveLoss(pos_margin=pos_margin, neg_margin=neg_margin)
        super().__init__(loss, classes, dim, weight=weight, power=power, seed=seed)
        self.neg_margin = neg_margin

    def overlap(self, similarity: Tensor) -> Tensor:
        """See the class."""
        return (self.neg_margin - 1 + similarity).relu()


@paper("mean-field-dml")
class MeanFieldMultiSimilarity(_MeanField):
    """Class-wise multi-similarity against learned mean fields (paper mean-field-dml).

    Args:
        classes, dim, seed: see :class:`ProxyObjective`.
        alpha, beta, base: see :class:`MeanFieldMultiSimilarityLoss`.
        weight: of ``mean_c sum_c' softplus_beta(s(M_c, M_c') - base)^power``.
        power: of it.
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        *,
        alpha: float = 2.0,
        beta: float = 32.0,
        base: float = 0.5,
        weight: float = 1.0,
        power: float = 2.0,
        seed: int = 0,
    ) -> None:
        loss = MeanFieldMultiSimilarityLoss(alpha=alpha, beta=beta, base=base)
        super().__init__(loss, classes, dim, weight=weight, power=power, seed=seed)
        self.beta = beta
        self.base = base

    def overlap(self, similarity: Tensor) -> Tensor:
        """See the class."""
        return nn.functional.softplus(similarity - self.base, beta=self.beta)
