"""Lightning attention: the time of a token does not depend on how long the text is."""

from __future__ import annotations

import time

import numpy as np
import torch

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.lightning import LightningAttention
from polyhead.claims._tiny_tasks import seed_interval
from polyhead.claims.base import Evidence, Scale, Verdict


def run(scale: Scale, seed: int) -> Evidence:
    """Power of text length that the time of a token grows with, a fixed number of tokens in each run."""
    lengths = (512, 1024, 2048, 4096) if scale == "smoke" else (512, 1024, 2048, 4096, 8192, 16384)
    rounds, total = (12, lengths[-1]) if scale == "smoke" else (8, lengths[-1])
    shape = AttentionShape(64, 4)
    torch.manual_seed(seed)
    layers = {"lightning": LightningAttention(shape, causal=True), "softmax": Attention(shape, causal=True)}
    powers: dict[str, list[float]] = {name: [] for name in layers}
    rates: dict[str, list[float]] = {}
    with torch.no_grad():
        for name, layer in layers.items():
            texts = [torch.randn(total // length, length, 64) for length in lengths]
            layer(texts[0])
            for _ in range(rounds):
                seconds = []
                for text in texts:
                    started = time.perf_counter()
                    layer(text)
                    seconds.append(time.perf_counter() - started)
                powers[name].append(float(np.polyfit(np.log(lengths), np.log(seconds), 1)[0]))
                rates[name] = [round(total / each) for each in seconds]
    power = seed_interval(powers["lightning"])
    flat: Verdict = "supported" if power.high < 0.2 else "refuted" if power.low > 0.2 else "inconclusive"
    return Evidence(
        measured={"power": power.value},
        baseline={"power softmax": float(np.mean(powers["softmax"]))},
        expected="a power below 0.2 (0 is a constant time a token), softmax near 1 in long texts",
        interval=(power.low, power.high),
        verdict=flat,
        decides="power",
        data="random states",
        model="one layer of 64 features and 4 heads, forward",
        notes="CPU time in plain PyTorch, forward only; the interval is over repeated runs beside other work.",
        details={"lengths": list(lengths), "tokens_a_second_last_run": rates, "powers": powers},
    )
