"""Metrix: mixing embeddings of positives and negatives improves contrastive and multi-similarity losses."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from polyhead.claims._metric_learning import by_class, compare
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.objectives import ContrastiveLoss, Metrix, MultiSimilarityLoss, Objective, utilization


def run(scale: Scale, seed: int) -> Evidence:
    """Recall@1 on unseen characters with embedding-level mixing less that without, mean of two base losses.

    Weight 0.4, shares from Beta(2, 2), three hardest negatives. Also the utilisation: mean squared distance of half of
    the unseen drawings to the nearest of the other half, on the unit sphere, divided by the mean squared distance.
    """
    found = compare(
        {
            "contrastive": lambda run: _contrastive(),
            "contrastive mixed": lambda run: Metrix(_contrastive(), seed=run),
            "multi-similarity": lambda run: Objective(MultiSimilarityLoss()),
            "multi-similarity mixed": lambda run: Metrix(Objective(MultiSimilarityLoss()), seed=run),
        },
        scale,
        seed,
    )
    gains = [found.hits[f"{name} mixed"] - found.hits[name] for name in ("contrastive", "multi-similarity")]
    difference = by_class(np.concatenate(gains), found.labels, seed=seed)
    return Evidence(
        measured={
            "recall@1 contrastive mixed": found.mean("contrastive mixed"),
            "recall@1 multi-similarity mixed": found.mean("multi-similarity mixed"),
            "difference": difference.value,
        },
        baseline={f"recall@1 {name}": found.mean(name) for name in ("contrastive", "multi-similarity")},
        expected="a higher recall@1 with mixing, over both base losses",
        interval=(difference.low, difference.high),
        verdict=verdict_of(difference.low, difference.high),
        decides="difference",
        data=found.data,
        model="convolutional network of 3 layers",
        notes="Mixing at the level of embeddings only; inputs and features can be mixed with the same class.",
        details={
            "utilisation": {
                name: float(np.mean([_used(x) for x in vectors])) for name, vectors in found.vectors.items()
            }
        },
    )


def _contrastive() -> Objective:
    return Objective(ContrastiveLoss(pos_margin=0.9, neg_margin=0.3))


def _used(x: torch.Tensor) -> float:
    unit = nn.functional.normalize(x, dim=1)
    return float(utilization(unit[0::2], unit[1::2]) / unit.var(0).sum())
