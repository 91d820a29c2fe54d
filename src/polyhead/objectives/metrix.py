"""Mixup for any pair or proxy loss: mixed vectors are partly positive, partly negative (paper metrix)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.objectives.base import Objective
from polyhead.objectives.proxies import ProxyObjective
from polyhead.objectives.relation import Relation
from polyhead.objectives.similarity import squared_distance
from polyhead.papers import paper

__all__ = ["Metrix", "MixPlan", "utilization"]


class MixPlan(NamedTuple):
    """Which rows are mixed, for which anchor, and in what share.

    Attributes:
        anchor, first, second: ``[t]`` rows; ``first`` is the anchor's positive (or itself), ``second`` its negative.
        share: ``[t]`` of ``first``; of ``second`` the rest.
    """

    anchor: Tensor
    first: Tensor
    second: Tensor
    share: Tensor

    def mix(self, values: Tensor) -> Tensor:
        """Mixed rows ``[t, ...]`` of ``values [n, ...]``: inputs, features or embeddings."""
        share = self.share.to(values).view(-1, *[1] * (values.ndim - 1))
        return share * values[self.first] + (1 - share) * values[self.second]


@paper("metrix")
class Metrix(nn.Module):
    """``objective(clean) + weight * loss(mixed)``: a mixed vector is ``share`` positive, the rest negative.

    Any objective can be mixed, for every loss reads a relation with such weights; with shares of 0 and 1 it is the
    clean loss of the partners. For an objective of pairs each anchor's positives (or the anchor itself) are mixed with
    its hardest negatives. For one with proxies, vectors of two classes are mixed for all proxies.

    Args:
        objective: the clean one.
        weight: of the mixed loss.
        alpha: shares are drawn from Beta(alpha, alpha).
        hardest: negatives an anchor that take part.
        partner: mix negatives with the "positive" or with the "anchor".
        seed: of the shares and of the partners of proxies.

    Example:
        >>> import torch
        >>> from polyhead.objectives import Metrix, MultiSimilarityLoss, Objective
        >>> objective = Metrix(Objective(MultiSimilarityLoss()), weight=0.4)
        >>> objective(torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])).ndim
        0
    """

    def __init__(
        self,
        objective: Objective,
        *,
        weight: float = 0.4,
        alpha: float = 2.0,
        hardest: int = 3,
        partner: Literal["positive", "anchor"] = "positive",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if alpha <= 0 or hardest < 1 or partner not in ("positive", "anchor"):
            raise InputError(
                f"alpha {alpha}, hardest {hardest}, partner {partner!r}: expected alpha above 0, at least one "
                "negative, and 'positive' or 'anchor'."
            )
        self.objective = objective
        self.weight = weight
        self.alpha = alpha
        self.hardest = hardest
        self.partner = partner
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def plan(self, embeddings: Tensor, labels: Tensor) -> MixPlan:
        """Draw what is mixed in a batch.

        Args:
            embeddings: ``[n, d]``; the hardest negatives are found with them.
            labels: ``[n]`` integers.
        """
        if isinstance(self.objective, ProxyObjective):
            first = torch.arange(len(labels), device=labels.device)
            second = torch.randperm(len(labels), generator=self._generator).to(labels.device)
            differ = labels[first] != labels[second]
            anchor, first, second = first[differ], first[differ], second[differ]
        else:
            relation = Relation.from_labels(labels)
            similarity = self.objective.similarity(embeddings).masked_fill(~relation.is_negative, -torch.inf)
            near = similarity.topk(min(self.hardest, similarity.shape[1]), 1)
            if self.partner == "anchor":
                rows = torch.arange(len(labels), device=labels.device)
                pairs = torch.stack((rows, rows), 1)[relation.is_positive.any(1)]
            else:
                pairs = relation.is_positive.nonzero()
            real = near.values[pairs[:, 0]].isfinite()
            which, place = real.nonzero(as_tuple=True)
            anchor, first = pairs[which].T
            second = near.indices[anchor, place]
        drawn = torch._standard_gamma(torch.full((2, len(anchor)), self.alpha), generator=self._generator)
        return MixPlan(anchor, first, second, (drawn[0] / drawn.sum(0)).to(embeddings))

    def forward(
        self, embeddings: Tensor, labels: Tensor, plan: MixPlan | None = None, mixed: Tensor | None = None
    ) -> Tensor:
        """The objective of a batch.

        Args:
            embeddings: ``[n, d]``.
            labels: ``[n]`` integers.
            plan: what is mixed; drawn where None.
            mixed: ``[t, d]`` embeddings of what was mixed by the plan at the level of inputs or features; None: the
                embeddings are mixed.
        """
        if mixed is not None and plan is None:
            raise InputError("Mixed vectors need the plan they were mixed by: Metrix.plan(embeddings, labels).")
        plan = self.plan(embeddings, labels) if plan is None else plan
        clean = self.objective(embeddings, labels)
        if not len(plan.anchor):
            return clean
        mixed = plan.mix(embeddings) if mixed is None else mixed
        if len(mixed) != len(plan.anchor):
            raise InputError(f"The plan mixes {len(plan.anchor)} rows, got {len(mixed)} mixed vectors.")
        if isinstance(self.objective, ProxyObjective):
            return clean + self.weight * self._of_proxies(mixed, labels, plan, self.objective)
        return clean + self.weight * self._of_pairs(embeddings, mixed, plan)

    def _of_pairs(self, embeddings: Tensor, mixed: Tensor, plan: MixPlan) -> Tensor:
        """Each anchor's mixed vectors stand in its row, as many columns as the longest row."""
        values = self.objective.similarity.paired(embeddings[plan.anchor], mixed)
        order = plan.anchor.argsort(stable=True)
        counts = plan.anchor.bincount(minlength=len(embeddings))
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(order), device=order.device) - starts[plan.anchor[order]]
        at = (plan.anchor[order], place)
        empty = values.new_zeros(len(embeddings), int(counts.max()))
        share = plan.share.to(values)[order]
        relation = Relation(empty.index_put(at, share), empty.index_put(at, 1 - share))
        mixed_loss: Tensor = self.objective.loss(empty.index_put(at, values[order]), relation)
        return mixed_loss

    @staticmethod
    def _of_proxies(mixed: Tensor, labels: Tensor, plan: MixPlan, objective: ProxyObjective) -> Tensor:
        classes = len(objective.proxies)
        share = plan.share[:, None].to(mixed)
        one = nn.functional.one_hot(labels, classes).to(mixed)
        positive = share * one[plan.first] + (1 - share) * one[plan.second]
        loss: Tensor = objective(mixed, Relation(positive, 1 - positive))
        return loss


@paper("metrix")
def utilization(queries: Tensor, train: Tensor, *, chunk: int = 1024) -> Tensor:
    """Mean squared distance of queries to their nearest training vector; lower: training covers more of the space.

    Args:
        queries: ``[q, d]``.
        train: ``[n, d]``.
        chunk: queries compared at once.
    """
    parts = [squared_distance(part, train).amin(1) for part in queries.split(chunk)]
    return torch.cat(parts).mean()
