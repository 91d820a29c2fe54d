"""Contextual loss: with wrong labels it loses less than the contrastive loss it contains."""

from __future__ import annotations

from polyhead.claims._metric_learning import by_class, compare
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.objectives import ContextualLoss, ContrastiveLoss, MultiSimilarityLoss, Objective


def run(scale: Scale, seed: int) -> Evidence:
    """How much recall@1 on unseen characters falls with 40% of training labels drawn anew.

    Decides: the fall of the contrastive loss (the same margins as within the contextual loss) less that of the
    contextual loss.
    """
    kinds = {
        "contextual": lambda run: Objective(ContextualLoss(k=5)),
        "contrastive": lambda run: Objective(ContrastiveLoss(pos_margin=0.75, neg_margin=0.6)),
        "multi-similarity": lambda run: Objective(MultiSimilarityLoss()),
    }
    clean, noisy = (compare(kinds, scale, seed, noise=noise) for noise in (0.0, 0.4))
    fall = {name: clean.hits[name] - noisy.hits[name] for name in kinds}
    difference = by_class(fall["contrastive"] - fall["contextual"], clean.labels, seed=seed)
    return Evidence(
        measured={
            "recall@1 contextual, clean": clean.mean("contextual"),
            "recall@1 contextual, 40% noise": noisy.mean("contextual"),
            "difference of falls": difference.value,
        },
        baseline={
            "recall@1 contrastive, clean": clean.mean("contrastive"),
            "recall@1 contrastive, 40% noise": noisy.mean("contrastive"),
            "recall@1 multi-similarity, clean": clean.mean("multi-similarity"),
            "recall@1 multi-similarity, 40% noise": noisy.mean("multi-similarity"),
        },
        expected="recall@1 falls less with wrong labels than the contrastive loss's does",
        interval=(difference.low, difference.high),
        verdict=verdict_of(difference.low, difference.high),
        decides="difference of falls",
        data=clean.data,
        model="convolutional network of 3 layers",
        notes="A loss that is worse with clean labels has less to fall: read both columns.",
    )
