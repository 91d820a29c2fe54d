"""One write-head is all you need: decoding with one key-value head is far cheaper, and hardly worse."""

from __future__ import annotations

import time

import numpy as np
import torch

from polyhead.attention import AttentionShape, State
from polyhead.attention.grouped import GroupedQueryAttention
from polyhead.claims._tiny_decoder import RecallTask, TinyDecoder
from polyhead.claims._tiny_tasks import seed_interval
from polyhead.claims.base import Evidence, Scale
from polyhead.evaluate.statistics import bootstrap_interval

HEADS = 8
MORE_THAN, LOSS = 4.0, 0.02
"""Half of the eightfold saving in cache traffic; two points of accuracy."""


def run(scale: Scale, seed: int) -> Evidence:
    """Time of a decoding step, cache bytes and accuracy of recall with 1 and with 8 key-value heads.

    Supported where a step at the longest context is more than 4 times as fast and accuracy falls by less than 2 points;
    refuted where either interval lies wholly on the other side. Time is the process's own, so that a busy machine does
    not count.
    """
    full = scale == "full"
    contexts = (512, 2048, 8192) if full else (512, 4096)
    ratios, cache = {}, {}
    for context in contexts:
        ratios[context] = _step_ratios(context, 60 if full else 30)
        cache[context] = [_layer(kv).cache_bytes(context) for kv in (HEADS, 1)]
    faster = bootstrap_interval(np.log(ratios[contexts[-1]]), seed=seed)
    low, value, high = (float(np.exp(each)) for each in (faster.low, faster.value, faster.high))
    seeds = range(seed, seed + (8 if full else 3))
    accuracy: dict[int, list[float]] = {HEADS: [], 1: []}
    for each in seeds:
        for kv_heads, found in accuracy.items():
            torch.manual_seed(each)
            found.append(RecallTask(16, each).train(_decoder(kv_heads), 200))
    lost = seed_interval([a - b for a, b in zip(accuracy[HEADS], accuracy[1], strict=True)])
    supported = low > MORE_THAN and lost.high < LOSS
    refuted = high < MORE_THAN or lost.low > LOSS
    return Evidence(
        measured={
            "times faster": value,
            **{f"times faster at {n}": float(np.exp(np.log(each).mean())) for n, each in ratios.items()},
            "accuracy, 1": float(np.mean(accuracy[1])),
            "accuracy lost": lost.value,
            "cache, share": cache[contexts[-1]][1] / cache[contexts[-1]][0],
        },
        baseline={"accuracy, 8": float(np.mean(accuracy[HEADS]))},
        expected=f"a step at {contexts[-1]} tokens more than 4 times as fast, accuracy less than 2 points lower",
        interval=(low, high),
        verdict="supported" if supported else "refuted" if refuted else "inconclusive",
        decides="times faster",
        data=f"steps of a layer, batch 8, 8 heads of 32, float32, one thread; recall of 16 pairs, {len(seeds)} seeds",
        model="one attention layer; Llama of 1 layer, the feed-forward widened to as many parameters",
        notes="The paper's tenfold is a TPU's, whose decoding waits for memory alone; a CPU core also waits for the "
        "products, which are as many with one key-value head. Layers take turns, step by step: a first version timed "
        "one after the other, and its interval was a busy machine's.",
        details={
            "interval of accuracy lost": [lost.low, lost.high],
            "cache bytes, 8 and 1": {str(n): each for n, each in cache.items()},
        },
    )


def _layer(kv_heads: int) -> GroupedQueryAttention:
    return GroupedQueryAttention(AttentionShape(256, HEADS, kv_heads), causal=True)


@torch.no_grad()
def _step_ratios(context: int, repeats: int) -> np.ndarray:
    """How many times as long a step after ``context`` tokens takes with all key-value heads, turn by turn."""
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(8, 1, 256, generator=generator)
    runs = []
    for kv_heads in (HEADS, 1):
        before = {name: torch.randn(8, kv_heads, context, 32, generator=generator) for name in ("keys", "values")}
        runs.append((_layer(kv_heads), State(context, before)))
    found = []
    for _ in range(repeats + 3):
        times = []
        for layer, state in runs:
            started = time.process_time()
            layer.step(new, state)
            times.append(time.process_time() - started)
        found.append(times[0] / times[1])
    return np.array(found[3:])


def _decoder(kv_heads: int) -> TinyDecoder:
    """The narrow one has as many parameters: its feed-forward layers get what its keys and values gave up."""
    made = TinyDecoder(layers=1, kv_heads=kv_heads)
    spare = sum(p.numel() for p in TinyDecoder(layers=1).parameters()) - sum(p.numel() for p in made.parameters())
    mlp = made.body.layers[0].mlp
    width = mlp.up_proj.out_features + spare // (3 * mlp.up_proj.in_features)
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, torch.nn.Linear(mlp.up_proj.in_features, width, bias=False))
    mlp.down_proj = torch.nn.Linear(width, mlp.down_proj.out_features, bias=False)
    return made
