"""Alignment and uniformity: the two together say how good a space is, and can be trained for without softmax."""

from __future__ import annotations

import numpy as np

from polyhead.claims._metric_learning import compare
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.evaluate.statistics import bootstrap_of
from polyhead.objectives import AlignUniformLoss, InfoNCE, Objective, alignment, uniformity


def run(scale: Scale, seed: int) -> Evidence:
    """Correlation of recall@1 with ``-(alignment + uniformity)`` over networks trained in many ways.

    InfoNCE at several temperatures and the direct loss at several weights, on Omniglot; both figures and recall are
    taken on characters not seen in training. Decides: Spearman's correlation over networks, its interval by resampling
    networks. Besides: the best direct loss less the best InfoNCE.
    """
    from scipy.stats import spearmanr

    heads = {f"infonce {t}": lambda run, t=t: Objective(InfoNCE(temperature=t)) for t in (0.03, 0.07, 0.15, 0.5, 2.0)}
    direct = {
        f"direct {a}": lambda run, a=a: Objective(AlignUniformLoss(align=a, uniform=1.0)) for a in (0.1, 0.5, 1.0, 2.0)
    }
    found = compare({**heads, **direct}, scale, seed, steps=80 if scale == "smoke" else 400)
    same = found.labels.unique()
    pairs = np.array([np.flatnonzero(found.labels.numpy() == label)[:20] for label in same])
    quality, recall = [], []
    for name, vectors in found.vectors.items():
        for hits, x in zip(found.hits[name], vectors, strict=True):
            close = alignment(x[pairs[:, 0::2].ravel()], x[pairs[:, 1::2].ravel()])
            quality.append(-float(close + uniformity(x)))
            recall.append(float(hits.mean()))
    values = np.array([quality, recall])
    interval = bootstrap_of(lambda rows: float(spearmanr(*values[:, rows]).statistic), len(quality), seed=seed)
    best = [max(names, key=found.mean) for names in (direct, heads)]
    difference = found.difference(best[0], best[1], seed)
    return Evidence(
        measured={
            "spearman": interval.value,
            f"recall@1 best direct ({best[0]})": found.mean(best[0]),
            "direct less infonce": difference.value,
        },
        baseline={f"recall@1 best infonce ({best[1]})": found.mean(best[1])},
        expected="networks with lower alignment + uniformity have a higher recall@1: correlation above 0",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high),
        decides="spearman",
        data=found.data,
        model="convolutional network of 3 layers",
        notes="Positive pairs are of a label, not augmented views. The two figures are weighed equally, as they come.",
        details={
            "networks": len(quality),
            "direct less infonce, 95%": [difference.low, difference.high],
            "recall@1": {name: found.mean(name) for name in found.hits},
        },
    )
