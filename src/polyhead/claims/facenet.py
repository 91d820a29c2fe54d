"""FaceNet: which negatives make the triplets decides: semi-hard train better than random, the hardest collapse."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from polyhead.claims._metric_learning import compare
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.objectives import EmbeddingVerifier, Objective, TripletLoss, TripletMiner


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
    verified = {kind: np.mean([_verify(x, found.labels) for x in found.vectors[kind]], 0).tolist() for kind in kinds}
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
        details={"verification accuracy, and acceptance at 1% false": verified, "total variance": spread},
    )


def _verify(vectors: Tensor, labels: Tensor) -> tuple[float, float]:
    """Accuracy of one threshold over ten folds, and share of same pairs accepted where 1% of others are."""
    generator = torch.Generator().manual_seed(0)
    same = (labels[:, None] == labels).triu(1).nonzero()
    same = same[torch.randperm(len(same), generator=generator)[:3000]]
    other = torch.randint(len(labels), (2 * len(same), 2), generator=generator)
    other = other[labels[other[:, 0]] != labels[other[:, 1]]][: len(same)]
    pairs = torch.cat((same, other))
    given = (vectors[pairs[:, 0]], vectors[pairs[:, 1]], torch.arange(len(pairs)) < len(same))
    return EmbeddingVerifier().fit(*given).accuracy_, EmbeddingVerifier().val_at_far(*given, far=0.01)
