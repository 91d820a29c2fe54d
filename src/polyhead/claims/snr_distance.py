"""SNR distance: the noise-to-signal ratio trains a better space than the Euclidean distance of raw vectors."""

from __future__ import annotations

from polyhead.claims._metric_learning import compare
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.objectives import (
    CosineSimilarity,
    EuclideanSimilarity,
    Objective,
    SNRSimilarity,
    TripletLoss,
    TripletMiner,
    ZeroMeanRegularizer,
)


def run(scale: Scale, seed: int) -> Evidence:
    """Recall@1 on unseen characters of a semi-hard triplet loss on SNR less that on raw Euclidean distance.

    Each space is judged with the similarity it was trained with. Margins are 0.2 in each similarity's own units.
    """
    kinds = {"snr": SNRSimilarity(), "euclid": EuclideanSimilarity(), "cosine": CosineSimilarity()}

    def objective(name: str) -> Objective:
        extra = [ZeroMeanRegularizer(0.01)] if name == "snr" else []
        return Objective(TripletLoss(), kinds[name], [TripletMiner("semihard")], extra)

    found = compare(
        {name: lambda run, name=name: objective(name) for name in kinds},  # type: ignore[misc]
        scale,
        seed,
        similarity=dict(kinds),
    )
    difference = found.difference("snr", "euclid", seed)
    return Evidence(
        measured={"recall@1 snr": found.mean("snr"), "difference": difference.value},
        baseline={"recall@1 euclid": found.mean("euclid"), "recall@1 cosine": found.mean("cosine")},
        expected="a higher recall@1 with the noise-to-signal ratio than with raw Euclidean distance",
        interval=(difference.low, difference.high),
        verdict=verdict_of(difference.low, difference.high),
        decides="difference",
        data=found.data,
        model="convolutional network of 3 layers",
        notes="One loss, triplet; the paper also has contrastive, lifted, N-pair and hashing.",
    )
