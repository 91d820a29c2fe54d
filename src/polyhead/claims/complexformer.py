"""ComplexFormer: do heads that adapt angles predict characters better than rotary heads, and further than trained?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.complexformer import ComplexAttention, ComplexNetworkAttention
from polyhead.claims._tiny_tasks import (
    TinyTransformer,
    accuracy_and_bits,
    character_scores,
    recall_batch,
    seed_interval,
    train,
)
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.positions import RotaryPositions


def _layer(name: str, shape: AttentionShape) -> Attention:
    if name == "RoPE":
        return Attention(shape, causal=True, positions=RotaryPositions(shape.size))
    if name == "network":
        return ComplexNetworkAttention(shape, causal=True)
    return ComplexAttention(shape, causal=True, adapt="affine" if name == "affine" else "identity")


def _model(name: str, shape: AttentionShape, features: int = 40, classes: int = 40) -> TinyTransformer:
    return TinyTransformer([_layer(name, shape) for _ in range(2)], features, classes)


def run(scale: Scale, seed: int) -> Evidence:
    """Bits a character at the length of training and at four times it; at full scale recall of more pairs too."""
    full = scale == "full"
    seeds, steps = range(seed, seed + (5 if full else 3)), 300 if full else 60
    shape, short = AttentionShape(64 if full else 32, 4), 48
    kinds = ("RoPE", "identity", "affine", "network") if full else ("RoPE", "identity", "affine")
    makers: dict[str, Callable[[], TinyTransformer]] = {name: partial(_model, name, shape) for name in kinds}
    found = character_scores(makers, seeds, steps, lengths=[short, 4 * short])
    bits = {name: values[:, :, 1] for name, values in found.items()}
    saved = seed_interval((bits["RoPE"][:, 0] - bits["affine"][:, 0]).tolist())
    longer = seed_interval((bits["RoPE"][:, 1] - bits["affine"][:, 1]).tolist())
    both = min(saved.low, longer.low), min(saved.high, longer.high)
    recalled = {name: [_recall(name, each) for each in seeds] for name in ("RoPE", "affine")} if full else {}
    return Evidence(
        measured={
            "smaller of both": min(saved.value, longer.value),
            f"bits saved at {short}": saved.value,
            f"bits saved at {4 * short}": longer.value,
            **{f"bits at {short}, {name}": float(bits[name][:, 0].mean()) for name in kinds if name != "RoPE"},
            **{f"bits at {4 * short}, {name}": float(bits[name][:, 1].mean()) for name in kinds if name != "RoPE"},
        },
        baseline={
            f"bits at {length}, RoPE": float(bits["RoPE"][:, at].mean()) for at, length in enumerate((short, 4 * short))
        },
        expected="affine angles need fewer bits a character than RoPE, at the length of training and at four times it",
        interval=both,
        verdict=verdict_of(*both),
        decides="smaller of both",
        data=f"characters of AG News, trained on stretches of {short}",
        model=f"2 layers of 4 heads, {shape.dim} features, {steps} steps, {len(seeds)} seeds",
        notes="The paper leaves Adapt open; affine and network are ours. All start as RoPE.",
        details={**{name: values.tolist() for name, values in bits.items()}, "recall of 16 and 64 pairs": recalled},
    )


def _recall(name: str, seed: int) -> list[float]:
    """Accuracy of recall after training on 16 pairs, tested on 16 and on 64."""
    torch.manual_seed(seed)
    model = _model(name, AttentionShape(32, 4), 80, 16)
    train(model, lambda generator: recall_batch(generator, 32, 16), 150, seed, 5e-3)
    tests = [recall_batch(torch.Generator().manual_seed(10_000 + seed), 128, pairs) for pairs in (16, 64)]
    return [accuracy_and_bits(model, test)[0] for test in tests]
