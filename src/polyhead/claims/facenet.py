"""FaceNet: which negatives make the triplets decides: semi-hard train better than random, the hardest collapse."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from polyhead.claims._metric_learning import compare
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.objectives import Objective, TripletLoss, TripletMiner


def run(scale: Scale, seed: int) -> Evidence:
    """Recall@1 on unseen characters with semi-hard, random and hardest negatives; the first two decide.

    A small convolutional network on Omniglot in place of a face network; one negative for each positive pair, margin
    0.2. Besides: accuracy of verification by one threshold, and the spread of the vectors (0 at collapse).
    """
    kinds = ("semihard", "random", "hard")
    found = compare(
        {
            kind: lambda run, kind=kind: Objective(TripletLoss(), miners=[TripletMiner(kind, seed=run)])  # type: ignore[misc]
            for kind in kinds
        },
        scale,
        seed,
    )
    difference = found.difference("semihard", "random", seed)
    verified = {kind: float(np.mean([_verify(x, found.labels) for x in found.vectors[kind]])) for kind in kinds}
    spread = {
        kind: float(np.mean([nn.functional.normalize(x, dim=1).var(0).sum() for x in found.vectors[kind]]))
        for kind in kinds
    }
    return Evidence(
        measured={"recall@1 semi-hard": found.mean("semihard"), "difference": difference.value},
        baseline={"recall@1 random": found.mean("random"), "recall@1 hardest": found.mean("hard")},
        expected="semi-hard negatives give a higher recall@1 than random ones; the hardest are unstable",
        interval=(difference.low, difference.high),
        verdict=verdict_of(difference.low, difference.high),
        decides="difference",
        data=found.data,
        model="convolutional network of 3 layers",
        notes="Handwriting, not faces, and batches of 120, not 1,800. The interval is over characters.",
        details={"verification accuracy": verified, "total variance": spread},
    )


def _verify(vectors: Tensor, labels: Tensor) -> float:
    """Balanced accuracy of the best threshold on cosine, over all same pairs and as many drawn others."""
    unit = nn.functional.normalize(vectors, dim=1)
    scores = unit @ unit.T
    upper = torch.ones_like(scores, dtype=torch.bool).triu(1)
    same = (labels[:, None] == labels) & upper
    positive = scores[same].sort().values
    others = scores[upper & ~same]
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))[: len(positive)]
    negative = others[drawn].sort().values
    above = 1 - torch.searchsorted(positive, positive) / len(positive)
    below = torch.searchsorted(negative, positive) / len(negative)
    return float(((above + below) / 2).max())
