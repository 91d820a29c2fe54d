"""LoFiT: offsets on the heads it finds teach a task better than offsets on random heads."""

from __future__ import annotations

import numpy as np

from polyhead.act import LoFiT
from polyhead.act.vectors import Heads
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.data import load_sts
from polyhead.evaluate.statistics import bootstrap_of
from polyhead.heads.tasks import PairSimilarity, run_task


def run(scale: Scale, seed: int) -> Evidence:
    """Offsets on 4 of 72 heads of all-MiniLM-L6-v2, learned on STS 2014 pairs and judged on STS 2015."""
    model = loaded("all-MiniLM-L6-v2")
    full = scale == "full"
    steps, draws = (60, 3) if full else (8, 1)
    train = PairSimilarity(load_sts(2014).sample(512 if full else 32, seed), batch_size=16)
    test = PairSimilarity(load_sts(2015).sample(500 if full else 48, seed))
    rows = np.arange(len(test.data))
    tuner = LoFiT(steps=steps, learning_rate=1e-2, seed=seed)
    found = tuner.localize(model, train)
    generator = np.random.default_rng(seed)
    every = [(layer, head) for layer in range(model.layers) for head in range(model.heads)]

    def tuned(heads: Heads) -> np.ndarray:
        with tuner.fit(model, train, heads).on(model):
            return run_task(test, model)

    plain = run_task(test, model)
    chosen = tuned(found.top(4))
    at_random = [tuned([every[i] for i in generator.choice(len(every), 4, replace=False)]) for _ in range(draws)]

    def difference(rows: np.ndarray) -> float:
        return test.quality(chosen, rows) - float(np.mean([test.quality(each, rows) for each in at_random]))

    interval = bootstrap_of(difference, len(rows), resamples=500, seed=seed)
    return Evidence(
        measured={
            "difference": interval.value,
            "spearman, offsets on found heads": test.quality(chosen, rows),
        },
        baseline={
            "spearman, untuned": test.quality(plain, rows),
            "spearman, offsets on random heads": float(np.mean([test.quality(each, rows) for each in at_random])),
        },
        expected="offsets on the 4 heads that the learned scale ranks first beat offsets on 4 random heads",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high),
        decides="difference",
        data=f"{len(train.data)} pairs of STS 2014 to learn, {len(test.data)} of STS 2015; {draws} random draws",
        model=model.name,
        notes="A sentence encoder in place of a prompted decoder; not compared with LoRA.",
        details={"heads found": [list(at) for at in found.top(4)], "steps": steps},
    )
