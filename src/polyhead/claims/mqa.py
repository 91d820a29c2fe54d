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
        times = {kv: _step_times(kv, context, 24 if full else 12) for kv in (HEADS, 1)}
        ratios[context] = times[HEADS] / times[1]
        cache[context] = [_layer(kv).cache_bytes(context) for kv in (HEADS, 1)]
    faster = bootstrap_interval(ratios[contexts[-1]], seed=seed)
    seeds = range(seed, seed + (8 if full else 3))
    accuracy: dict[int, list[float]] = {HEADS: [], 1: []}
    for each in seeds:
        for kv_heads, found in accuracy.items():
            torch.manual_seed(each)
            found.append(RecallTask(16, each).train(_decoder(kv_heads), 200 if full else 150))
    lost = seed_interval([a - b for a, b in zip(accuracy[HEADS], accuracy[1], strict=True)])
    supported = faster.low > MORE_THAN and lost.high < LOSS
    refuted = faster.high < MORE_THAN or lost.low > LOSS
    return Evidence(
        measured={
            "times faster": faster.value,
            **{f"times faster at {n}": float(np.mean(each)) for n, each in ratios.items()},
            "accuracy, 1": float(np.mean(accuracy[1])),
            "accuracy lost": lost.value,
            "cache, share": cache[contexts[-1]][1] / cache[contexts[-1]][0],
        },
        baseline={"accuracy, 8": float(np.mean(accuracy[HEADS]))},
        expected=f"a step at {contexts[-1]} tokens more than 4 times as fast, accuracy less than 2 points lower",
        interval=(faster.low, faster.high),
        verdict="supported" if supported else "refuted" if refuted else "inconclusive",
        decides="times faster",
        data=f"steps of a layer, batch 8, 8 heads of 32, float32, one thread; recall of 16 pairs, {len(seeds)} seeds",
        model="one attention layer; Llama of 1 layer, the feed-forward widened to as many parameters",
        notes="The paper's tenfold is a TPU's, whose decoding waits for memory alone; a CPU core also waits for the "
        "products, which are as many with one key-value head.",
        details={
            "interval of accuracy lost": [lost.low, lost.high],
            "cache bytes, 8 and 1": {str(n): each for n, each in cache.items()},
        },
    )


def _layer(kv_heads: int) -> GroupedQueryAttention:
    return GroupedQueryAttention(AttentionShape(256, HEADS, kv_heads), causal=True)


@torch.no_grad()
def _step_times(kv_heads: int, context: int, repeats: int) -> np.ndarray:
    """Milliseconds of process time of each of ``repeats`` steps after ``context`` tokens."""
    generator = torch.Generator().manual_seed(0)
    layer, new = _layer(kv_heads), torch.randn(8, 1, 256, generator=generator)
    before = {name: torch.randn(8, kv_heads, context, 32, generator=generator) for name in ("keys", "values")}
    state, found = State(context, before), []
    for _ in range(repeats + 3):
        started = time.process_time()
        layer.step(new, state)
        found.append(1000 * (time.process_time() - started))
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
