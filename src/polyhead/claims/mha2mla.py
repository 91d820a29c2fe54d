"""MHA2MLA: a trained model keeps its quality with a fifth of the cache, as latent attention, after a little tuning."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from polyhead.claims._tiny_decoder import RecallTask, TinyDecoder, converted
from polyhead.claims._tiny_tasks import recall_batch, seed_interval
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.compress import rope_contribution, to_mla
from polyhead.compress.mla import Selection

STEPS, SHARE = 240, 0.05
RANK, PAIRS = 8, 1
MOST_LOST = 0.02


def run(scale: Scale, seed: int) -> Evidence:
    """Recall of a Llama of 8 heads as latent attention: one rotary pair a head, a latent of 8 numbers for all of them.

    Decides: accuracy lost with pairs by 2-norm and joint factors after a twentieth of the training; 2 points at most.
    Beside it the other choices of pairs and separate factors, right after conversion and after tuning.
    """
    full = scale == "full"
    found: dict[str, list[float]] = {}
    share = 0.0
    for each in range(seed, seed + (8 if full else 3)):
        torch.manual_seed(each)
        task, teacher = RecallTask(16, each), TinyDecoder(layers=1)
        found.setdefault("8 heads", []).append(task.train(teacher, STEPS))
        contribution = _contribution(teacher, each)
        choices: dict[str, Selection | list[torch.Tensor]] = {
            "norm": contribution,
            "high": "high",
            "low": "low",
            "uniform": "uniform",
        }
        for name, select in choices.items():
            for factors in ("joint", "split") if full or name == "norm" else ("joint",):
                cut = partial(to_mla, rank=RANK, rope_pairs=PAIRS, select=select, factors=factors)
                student, report = converted(teacher, cut)
                share = report.after.cache_bytes_per_token / report.before.cache_bytes_per_token
                found.setdefault(f"{name} {factors}, at once", []).append(task.accuracy(student))
                tuned = task.train(student, round(SHARE * STEPS), stream=1)
                found.setdefault(f"{name} {factors}, tuned", []).append(tuned)
    lost = seed_interval([a - b for a, b in zip(found["8 heads"], found["norm joint, tuned"], strict=True)])
    accuracy = {name: float(np.mean(values)) for name, values in found.items()}
    return Evidence(
        measured={
            "accuracy lost": lost.value,
            "cache, share": share,
            **{name: accuracy[name] for name in ("norm joint, at once", "norm joint, tuned")},
        },
        baseline={
            "8 heads": accuracy["8 heads"],
            **{f"{name}, at once": accuracy[f"{name}, at once"] for name in ("norm split", "high joint", "low joint")},
        },
        expected="at most 2 points of accuracy lost with a fifth of the cache, after 5% of the training steps",
        interval=(lost.low, lost.high),
        verdict=verdict_of(-lost.high, -lost.low, more_than=-MOST_LOST),
        decides="accuracy lost",
        data=f"recall of 16 pairs, {len(found['8 heads'])} seeds",
        model="Llama of 1 layer, 8 heads of 8, 64 features",
        notes="The paper converts models of billions of weights and saves nine tenths; here 1 of 4 rotary pairs stays, "
        "which alone is an eighth of the cache.",
        details={"accuracy": accuracy},
    )


@torch.no_grad()
def _contribution(decoder: TinyDecoder, seed: int) -> list[torch.Tensor]:
    from polyhead.model import load

    texts = recall_batch(torch.Generator().manual_seed(20_000 + seed), 32, 16).inputs
    return rope_contribution(load(decoder.body), [{"inputs_embeds": decoder.enter(texts)}])
