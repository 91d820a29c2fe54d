"""Objectives: ``loss(similarity, relation)``. Similarity, miners and loss are chosen apart and fit together freely."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.objectives.relation import Relation
from polyhead.objectives.similarity import CosineSimilarity, Similarity

__all__ = ["Loss", "Miner", "Objective", "Regularizer", "Symmetric", "Terms", "weighted_logsumexp"]

Reduction = Literal["mean", "nonzero", "sum"]


class Terms(NamedTuple):
    """What a loss sums up: values of any one shape, and how much each counts (same shape, at least 0)."""

    values: Tensor
    weights: Tensor


class Loss(nn.Module):
    """A number for a similarity matrix ``[n, m]`` and a :class:`Relation` of its pairs.

    A weight in the relation counts a pair that many times: weight 2 is the pair twice, weight 0 is no pair. Rows or
    batches with nothing to learn from give 0 with a gradient of 0, never NaN.

    Attributes:
        similarity: what the paper compares vectors with; used by :class:`Objective` where none is named.

    Args:
        reduction: "mean" over the terms; "nonzero", over those above 0 (a margin met does not dilute those that
            are not); "sum".
    """

    similarity: ClassVar[type[Similarity]] = CosineSimilarity

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        super().__init__()
        if reduction not in ("mean", "nonzero", "sum"):
            raise InputError(f"reduction is {reduction!r}, expected 'mean', 'nonzero' or 'sum'.")
        self.reduction = reduction

    @abstractmethod
    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """Values and weights, one group for each mean that is taken; the means are added up.

        Args:
            similarity: ``[n, m]``, float32 or float64, more is closer.
            relation: of the same shape; its weights may be bool.
        """

    def forward(self, similarity: Tensor, relation: Relation) -> Tensor:
        """The loss, a scalar.

        Raises:
            InputError: a relation of another shape than the similarities.
        """
        if tuple(similarity.shape) != relation.shape:
            raise InputError(
                f"Similarities {list(similarity.shape)} and relation {list(relation.shape)} differ in shape: one row "
                "an anchor and one column a vector it is compared with, in both."
            )
        if similarity.dtype in (torch.float16, torch.bfloat16):
            similarity = similarity.float()
        total = similarity.sum() * 0  # keeps the graph where no term counts
        for values, weights in self.terms(similarity, relation):
            weights = weights.to(values.dtype)
            summed = (values * weights).sum()
            if self.reduction != "sum":
                counted = weights if self.reduction == "mean" else weights * (values.detach() > 0)
                size = counted.sum()
                summed = summed / torch.where(size > 0, size, torch.ones_like(size))
            total = total + summed
        return total


class Miner(nn.Module):
    """Chooses or weighs pairs: ``miner(similarity, relation) -> relation``, without gradient.

    A miner may set weights to 0, scale them, or list triplets. Miners follow each other.
    """

    @abstractmethod
    def forward(self, similarity: Tensor, relation: Relation) -> Relation:
        """The relation with the pairs chosen; ``similarity [n, m]`` carries no gradient."""


class Regularizer(nn.Module):
    """A term of the embeddings alone: ``regularizer(embeddings [n, d]) -> scalar``, its weight included."""


class Symmetric(Loss):
    """The mean of a loss seen from both sides: rows as anchors, and columns as anchors.

    Columns without a positive (hard negatives added to the others) are no anchors.

    Args:
        loss: any loss.
    """

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """See :class:`Loss`."""
        raise InputError("Symmetric has no terms of its own; call it, or ask the loss in it.")

    def forward(self, similarity: Tensor, relation: Relation) -> Tensor:
        """See :class:`Loss`."""
        anchors = relation.is_positive.any(0)
        back = relation.transposed
        back = Relation(
            back.positive[anchors], back.negative[anchors], None if back.grades is None else back.grades[anchors]
        )
        return (self.loss(similarity, relation) + self.loss(similarity.T[anchors], back)) / 2


class Objective(nn.Module):
    """What training minimises: embeddings and what is known of them -> a scalar.

    Args:
        loss: of similarities and relation.
        similarity: of embeddings; None: the loss's own.
        miners: choose and weigh pairs, in this order.
        regularizers: added, on the embeddings of both sides.

    Example:
        >>> import torch
        >>> from polyhead.objectives import FalseNegativeMask, InfoNCE, Objective
        >>> objective = Objective(InfoNCE(temperature=0.05), miners=[FalseNegativeMask(margin=0.1)])
        >>> queries, documents = torch.eye(4), torch.eye(4) + 0.1
        >>> round(objective(queries, other=documents).item(), 4)
        0.0
    """

    def __init__(
        self,
        loss: Loss,
        similarity: Similarity | None = None,
        miners: Sequence[Miner] = (),
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        super().__init__()
        self.loss = loss
        self.similarity = type(loss).similarity() if similarity is None else similarity
        self.miners = nn.ModuleList(miners)
        self.regularizers = nn.ModuleList(regularizers)

    def forward(
        self, embeddings: Tensor, relation: Relation | Tensor | None = None, other: Tensor | None = None
    ) -> Tensor:
        """The objective of a batch.

        Args:
            embeddings: ``[n, d]``.
            relation: a :class:`Relation`; or ``[n]`` integer labels of the embeddings (``other``, if given, has the
                same); or ``[n]`` float grades of the pairs ``(embeddings[i], other[i])``; or None: ``other[i]`` is the
                positive of ``embeddings[i]``, every other row of it a negative.
            other: ``[m, d]`` what the embeddings are compared with; None: each other.

        Raises:
            InputError: shapes or arguments that do not go together.
        """
        relation = relation_of(embeddings, relation, other)
        if relation.paired:
            if other is None:
                raise InputError("Graded pairs need `other`: the second vector of each pair.")
            similarity = self.similarity.paired(embeddings, other).unsqueeze(1)
        else:
            similarity = self.similarity(embeddings, other)
        with torch.no_grad():
            for miner in self.miners:
                relation = miner(similarity.detach(), relation)
        total = self.loss(similarity, relation)
        for regularizer in self.regularizers:
            total = total + regularizer(embeddings if other is None else torch.cat((embeddings, other)))
        return total


def relation_of(embeddings: Tensor, relation: Relation | Tensor | None, other: Tensor | None) -> Relation:
    """A relation of what :class:`Objective` takes in its place."""
    if isinstance(relation, Relation):
        return relation
    if relation is None:
        if other is None:
            raise InputError("Give labels, a relation, or `other` with the positive of each embedding in its row.")
        return Relation.diagonal(len(embeddings), len(other), device=embeddings.device)
    if relation.ndim != 1 or len(relation) != len(embeddings):
        raise InputError(
            f"{len(embeddings)} embeddings need {len(embeddings)} labels or grades, got {tuple(relation.shape)}; "
            "matrices go into a Relation."
        )
    if relation.is_floating_point():
        return Relation.graded(relation)
    if other is None:
        return Relation.from_labels(relation)
    if len(other) != len(relation):
        raise InputError(f"{len(relation)} labels, {len(other)} others: make a Relation.from_labels(labels, theirs).")
    return Relation.from_labels(relation, relation)


def weighted_logsumexp(values: Tensor, weights: Tensor, dim: int = 1, *, one: bool = False) -> Tensor:
    """``log(sum w exp(v))``, or with ``one`` ``log(1 + sum w exp(v))``, over ``dim``.

    Weights of 0 are left out, bool weights count once. Where all are left out it is ``-inf`` (0 with ``one``), with a
    gradient of 0.
    """
    counts = weights > 0
    if weights.dtype is not torch.bool:
        values = values + torch.where(counts, weights, torch.ones_like(weights)).to(values.dtype).log()
    values = values.masked_fill(~counts, -torch.inf)
    if one:
        return torch.logsumexp(torch.cat((values, torch.zeros_like(values.narrow(dim, 0, 1))), dim), dim)
    some = counts.any(dim, keepdim=True)
    summed = torch.logsumexp(values.masked_fill(~some, 0.0), dim)
    return summed.masked_fill(~some.squeeze(dim), -torch.inf)
