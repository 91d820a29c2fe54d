"""Coupled estimation: negatives that only look negative because nobody judged them (paper cet-pooling-bias)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.objectives.base import Miner
from polyhead.objectives.infonce import InfoNCE
from polyhead.objectives.relation import Relation
from polyhead.papers import paper

__all__ = ["CoupledEstimator", "RatioWeights", "false_negative_rate", "judged_within"]


@paper("cet-pooling-bias")
class RatioWeights(Miner):
    """Weighs each negative by the *other* model's scores: ``exp(t_n - t_p)``, clipped, ``p`` the positive.

    For a relevance loss the other model says how likely a document was to be judged: an unlabelled document that would
    hardly have been judged says little against its relevance. For the loss of that model the roles are changed.

    Args:
        clip: weights lie from the first to the second.
    """

    def __init__(self, clip: tuple[float, float] = (0.05, 1.0)) -> None:
        super().__init__()
        if not 0 <= clip[0] <= clip[1]:
            raise InputError(f"clip is {clip}, expected two numbers at least 0, the lower first.")
        self.clip = clip

    def forward(self, similarity: Tensor, relation: Relation) -> Relation:
        """See :class:`Miner`; ``similarity [n, m]`` are the other model's scores."""
        best = similarity.masked_fill(~relation.is_positive, -torch.inf).amax(1, keepdim=True)
        ratio = (similarity - torch.where(best.isfinite(), best, torch.zeros_like(best))).exp()
        return relation.weigh(negative=ratio.clamp(*self.clip))


@paper("cet-pooling-bias")
class CoupledEstimator:
    """Learns relevance and selection together, each correcting the other's list-wise loss (paper cet-pooling-bias).

    An observed label is "relevant and selected for judging". Both networks are trained with a softmax over one labelled
    positive and sampled candidates; each takes the other's ratios (:class:`RatioWeights`) as weights of its negatives.
    The paper builds on dual learning for unbiased ranking; where exactly the weights enter its losses was read off its
    description, not off its code.

    Args:
        relevance: network of pair features ``[..., f] -> [..., 1]``.
        selection: the same for whether a pair was judged, of its own features; None: no correction.
        clip: of the weights.
        epochs: passes over the lists.
        lr: learning rate of AdamW.
        seed: of the order of lists.

    Attributes:
        losses_: mean relevance loss of each epoch.

    Example:
        >>> import torch
        >>> from polyhead.objectives import CoupledEstimator
        >>> features = torch.randn(20, 6, 3)  # lists, candidates, features
        >>> positive = torch.zeros(20, dtype=torch.long)
        >>> model = CoupledEstimator(torch.nn.Linear(3, 1), torch.nn.Linear(3, 1), epochs=2).fit(features, positive)
        >>> model.score(features).shape
        torch.Size([20, 6])
    """

    def __init__(
        self,
        relevance: nn.Module,
        selection: nn.Module | None = None,
        *,
        clip: tuple[float, float] = (0.05, 1.0),
        epochs: int = 20,
        lr: float = 1e-2,
        seed: int = 0,
    ) -> None:
        self.relevance = relevance
        self.selection = selection
        self.clip = clip
        self.epochs = epochs
        self.lr = lr
        self.seed = seed

    def fit(self, features: Tensor, positive: Tensor, selection_features: Tensor | None = None) -> CoupledEstimator:
        """Train both.

        Args:
            features: ``[lists, candidates, f]`` for relevance.
            positive: ``[lists]`` which candidate is labelled relevant.
            selection_features: ``[lists, candidates, g]`` for selection; None: the same.
        """
        if features.ndim != 3 or positive.shape != features.shape[:1]:
            raise InputError(
                f"Expected features [lists, candidates, f] and one positive a list, got {list(features.shape)} and "
                f"{list(positive.shape)}."
            )
        chosen = features if selection_features is None else selection_features
        networks = [self.relevance] + ([] if self.selection is None else [self.selection])
        optimizer = torch.optim.AdamW([p for part in networks for p in part.parameters()], lr=self.lr)
        generator = torch.Generator().manual_seed(self.seed)
        weigh, loss = RatioWeights(self.clip), InfoNCE(temperature=1.0)
        self.losses_: list[float] = []
        for _ in range(self.epochs):
            total = 0.0
            for rows in torch.randperm(len(features), generator=generator).split(64):
                own = nn.functional.one_hot(positive[rows], features.shape[1]).bool()
                relation = Relation(own, ~own)
                relevance = self.relevance(features[rows])[..., 0]
                if self.selection is None:
                    value = step = loss(relevance, relation)
                else:
                    selection = self.selection(chosen[rows])[..., 0]
                    value = loss(relevance, weigh(selection.detach(), relation))
                    step = value + loss(selection, weigh(relevance.detach(), relation))
                optimizer.zero_grad()
                step.backward()
                optimizer.step()
                total += float(value.detach()) * len(rows)
            self.losses_.append(total / len(features))
        return self

    @torch.no_grad()
    def score(self, features: Tensor) -> Tensor:
        """Relevance ``[...]`` of features ``[..., f]``; selection plays no part."""
        scores: Tensor = self.relevance(features)[..., 0]
        return scores


def judged_within(
    qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Sequence[str]], depth: int
) -> dict[str, dict[str, int]]:
    """Judgements that annotators would have made had they seen only each query's first ``depth`` results of a run.

    Args:
        qrels: query -> document -> grade.
        run: query -> documents, best first.
        depth: of the pool.
    """
    return {
        query: {document: grade for document, grade in grades.items() if document in set(run.get(query, [])[:depth])}
        for query, grades in qrels.items()
    }


def false_negative_rate(qrels: Mapping[str, Mapping[str, int]], negatives: Mapping[str, Sequence[str]]) -> float:
    """Share of mined negatives that the full judgements call relevant.

    Args:
        qrels: query -> document -> grade, all there are.
        negatives: query -> mined documents.
    """
    mined = [(query, document) for query, documents in negatives.items() for document in documents]
    if not mined:
        raise InputError("No negatives were given.")
    return sum(qrels.get(query, {}).get(document, 0) > 0 for query, document in mined) / len(mined)
