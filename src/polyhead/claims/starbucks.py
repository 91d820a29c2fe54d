"""Starbucks: a fixed ladder of sizes trained together beats random sizes, and comes near to models trained apart."""

from __future__ import annotations

import numpy as np

from polyhead.claims._sts_training import Vectors, graded_pairs, layer_vectors, score, trained
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.data import load_sts
from polyhead.evaluate.statistics import bootstrap_of
from polyhead.objectives import CoSENTLoss
from polyhead.training import Matryoshka, Starbucks, TwoDMatryoshka

_SIZES = [(1, 64), (2, 128), (4, 256), (6, 384)]
_SMALL = _SIZES[:-1]


def run(scale: Scale, seed: int) -> Evidence:
    """all-MiniLM-L6-v2 trained on graded pairs: the ladder (1, 64) to (6, 384), 2DMSE, and a model for each size.

    Decided by the mean Spearman correlation on STS 2015 over the three sizes below the whole model, Starbucks less
    2DMSE. Smoke trains for 6 steps and one separate model, full for 80 and three.
    """
    full = scale == "full"
    steps = 80 if full else 6
    train = graded_pairs(16 * steps, seed)
    test = load_sts(2015).sample(800 if full else 64, seed)
    layers, widths = ([size[place] for size in _SIZES] for place in (0, 1))
    ladder = layer_vectors(trained(Starbucks(CoSENTLoss(), _SIZES), train, steps, seed), test, layers)
    random = layer_vectors(trained(TwoDMatryoshka(CoSENTLoss(), widths), train, steps, seed), test, layers)
    apart: Vectors = {}
    for layer, width in _SMALL if full else _SMALL[:1]:
        own = trained(Matryoshka(CoSENTLoss(), [width]), train, steps, seed, layers=layer)
        apart[layer] = layer_vectors(own, test, [layer])[layer]
    every = np.arange(len(test))

    def gain(rows: np.ndarray) -> float:
        return score(ladder, test.gold, _SMALL, rows) - score(random, test.gold, _SMALL, rows)

    interval = bootstrap_of(gain, len(test), resamples=300 if full else 100, seed=seed)
    return Evidence(
        measured={
            "difference": interval.value,
            **{f"spearman {size}, Starbucks": score(ladder, test.gold, [size], every) for size in _SIZES},
        },
        baseline={
            **{f"spearman {size}, 2DMSE": score(random, test.gold, [size], every) for size in _SIZES},
            **{f"spearman {s}, apart": score(apart, test.gold, [s], every) for s in _SMALL if s[0] in apart},
        },
        expected="Starbucks above 2DMSE at the sizes below the whole model, near to models trained apart",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high),
        decides="difference",
        data=f"STS 2012-14, {len(train)} pairs to train; STS 2015, {len(test)} pairs to test",
        model="all-MiniLM-L6-v2",
        notes="Fine-tuning alone, without the paper's masked auto-encoding; one seed; little training.",
        details={"steps": steps},
    )
