"""CARoPE: do angles that depend on the token predict characters better than fixed ones, and further than trained?"""

from __future__ import annotations

import math
import time

import torch
from torch import nn

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.base import Positions
from polyhead.claims._tiny_tasks import TinyTransformer, character_scores, seed_interval
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.positions import ContextRotaryPositions, RotaryPositions

_BASE = 10_000.0
_KINDS = ("learned places", "RoPE", "RoPE as fast as CARoPE", "CARoPE", "CARoPE started as RoPE")


def _model(name: str, shape: AttentionShape, longest: int) -> TinyTransformer:
    def positions() -> Positions | None:
        if name == "RoPE":
            return RotaryPositions(shape.size, _BASE)
        if name.startswith("RoPE"):  # x W = 0 turns pair i by (1 / (1 + log 2)) ** i a token
            return RotaryPositions(shape.size, (1 + math.log(2)) ** (shape.size / 2))
        if name.startswith("CARoPE"):
            base = _BASE if "started" in name else None
            return ContextRotaryPositions(shape.dim, shape.heads, shape.size, base=base)
        return None

    layers = [Attention(shape, causal=True, positions=positions()) for _ in range(2)]
    return TinyTransformer(layers, 40, 40, places=longest if name == "learned places" else 0)


def run(scale: Scale, seed: int) -> Evidence:
    """Bits a character at the length of training and at four times it: learned places, RoPE, CARoPE."""
    full = scale == "full"
    seeds, steps = range(seed, seed + (5 if full else 3)), 500 if full else 60
    shape, short = AttentionShape(64 if full else 32, 4), 48
    makers = {
        name: lambda name=name: _model(name, shape, 4 * short) for name in _KINDS if full or "started" not in name
    }
    found = character_scores(makers, seeds, steps, lengths=[short, 4 * short])
    bits = {name: values[:, :, 1] for name, values in found.items()}
    saved = seed_interval((bits["RoPE"][:, 0] - bits["CARoPE"][:, 0]).tolist())
    longer = seed_interval((bits["RoPE"][:, 1] - bits["CARoPE"][:, 1]).tolist())
    both = min(saved.low, longer.low), min(saved.high, longer.high)
    seconds = {name: _seconds(make()) for name, make in makers.items()}
    means = {name: values.mean(0).tolist() for name, values in bits.items()}
    return Evidence(
        measured={
            "smaller of both": min(saved.value, longer.value),
            f"bits saved against RoPE at {short}": saved.value,
            f"bits saved against RoPE at {4 * short}": longer.value,
            **{f"bits at {short}, {name}": means[name][0] for name in makers if name.startswith("CARoPE")},
            **{f"bits at {4 * short}, {name}": means[name][1] for name in makers if name.startswith("CARoPE")},
            "time of a step against RoPE": seconds["CARoPE"] / seconds["RoPE"],
        },
        baseline={
            f"bits at {length}, {name}": means[name][at]
            for name in ("learned places", "RoPE", "RoPE as fast as CARoPE")
            for at, length in enumerate((short, 4 * short))
        },
        expected="CARoPE needs fewer bits a character than RoPE, at the length of training and at four times it",
        interval=both,
        verdict=verdict_of(*both),
        decides="smaller of both",
        data=f"characters of AG News, trained on stretches of {short}",
        model=f"2 layers of 4 heads, {shape.dim} features, {steps} steps, {len(seeds)} seeds",
        notes="Time is of one training step, least of 7; the paper reports more throughput. It does not decide.",
        details={name: values.tolist() for name, values in bits.items()},
    )


def _seconds(model: nn.Module) -> float:
    """Least time of a forward and backward pass on 12 stretches."""
    inputs, taken = torch.randn(12, 48, 40), []
    for _ in range(7):
        begin = time.perf_counter()
        model(inputs).square().mean().backward()
        taken.append(time.perf_counter() - begin)
    return min(taken)
