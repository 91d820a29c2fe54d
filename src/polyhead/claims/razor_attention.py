"""RazorAttention: most of the cache can go if the heads that look back keep theirs whole."""

from __future__ import annotations

import numpy as np
import torch

from polyhead.cache import CachePolicy, RazorPolicy, WindowPolicy
from polyhead.claims._tiny_decoder import RecallTask, TinyDecoder, decoded, looks_back
from polyhead.claims._tiny_tasks import seed_interval
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.headmap import HeadMap

PAIRS, STEPS, SHARE = 24, 160, 0.15
MOST_LOST = 0.02


def run(scale: Scale, seed: int) -> Evidence:
    """Recall of 24 pairs by a Llama of two layers of 8 heads, the pairs read first and then cut out of the cache.

    Decides: accuracy lost with 15% of the heads whole (the paper's share), a sink, a window of one and one token for
    the rest; at most 2 points are "not noticeable". Beside it the same without that token, random heads whole, and a
    window that takes as many bytes.
    """
    full = scale == "full"
    accuracy: dict[str, list[float]] = {}
    share: dict[str, list[float]] = {}
    seeds = range(seed, seed + (8 if full else 3))
    for each in seeds:
        torch.manual_seed(each)
        task, model = RecallTask(PAIRS, each), TinyDecoder(layers=2)
        task.train(model, STEPS)
        whole = None
        for name, policy in _policies(looks_back(model, task, each), each).items():
            found, held = decoded(model, task, policy, PAIRS)
            whole = held if whole is None else whole
            accuracy.setdefault(name, []).append(found)
            share.setdefault(name, []).append(held / whole)
    lost = seed_interval([a - b for a, b in zip(accuracy["everything"], accuracy["razor"], strict=True)])
    mean = {name: float(np.mean(values)) for name, values in accuracy.items()}
    return Evidence(
        measured={"accuracy lost": lost.value, "cache, share": float(np.mean(share["razor"])), "razor": mean["razor"]},
        baseline={name: value for name, value in mean.items() if name != "razor"},
        expected="at most 2 points of accuracy lost with less than 30% of the cache",
        interval=(lost.low, lost.high),
        verdict=verdict_of(-lost.high, -lost.low, more_than=-MOST_LOST),
        decides="accuracy lost",
        data=f"recall of {PAIRS} pairs, {len(seeds)} seeds, 256 texts each",
        model="Llama of 2 layers, 8 heads, 64 features",
        notes="Heads are chosen by their attention to the pair asked for, on other texts of the task: the paper's echo "
        "score on random repeated tokens means nothing to a model that only knows this task. Gemma-3-270M has three "
        "global layers of one key-value head and nothing to choose among.",
        details={"cache, share": {name: float(np.mean(values)) for name, values in share.items()}, "by seed": accuracy},
    )


def _policies(scores: HeadMap, seed: int) -> dict[str, CachePolicy]:
    drawn = HeadMap(np.random.default_rng(seed).random(scores.shape), name="drawn")
    few = {"protect_induction": SHARE, "window": 1, "sinks": 1}
    return {
        "everything": WindowPolicy(protect=1.0),
        "razor": RazorPolicy(scores, **few),  # type: ignore[arg-type]
        "razor, no token for the rest": RazorPolicy(scores, compensate=False, **few),  # type: ignore[arg-type]
        "random heads": RazorPolicy(drawn, **few),  # type: ignore[arg-type]
        "window alone": WindowPolicy(window=6, sinks=1),
    }
