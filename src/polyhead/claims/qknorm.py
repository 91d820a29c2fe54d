"""QKNorm: do unit queries and keys bound logits, survive high rates, and recall as well?"""

from __future__ import annotations

import numpy as np
import torch

from polyhead.attention import Attention, AttentionShape, QKNormAttention
from polyhead.claims._tiny_tasks import Batch, TinyTransformer, accuracy_and_bits, recall_batch, seed_interval, train
from polyhead.claims.base import Evidence, Scale, verdict_of

_RATES = (3e-3, 9e-3, 3e-2)
_CHANCE = 2 / 16


def run(scale: Scale, seed: int) -> Evidence:
    """Accuracy of recall at learning rates x1, x3 and x10, largest logit, and runs that learned nothing."""
    full = scale == "full"
    seeds, steps, pairs = range(seed, seed + (5 if full else 3)), 400 if full else 80, 24 if full else 12
    deep = 2 if full else 1
    found: dict[str, list[list[float]]] = {"plain": [], "unit": []}
    largest: dict[str, list[float]] = {"plain": [], "unit": []}
    gains: list[float] = []
    for each in seeds:
        test = recall_batch(torch.Generator().manual_seed(10_000 + each), 256, pairs)
        for name, rows in found.items():
            row = []
            for rate in _RATES:
                torch.manual_seed(each)
                model = TinyTransformer([_layer(name, 2 * pairs) for _ in range(deep)], 80, 16)
                train(model, lambda generator: recall_batch(generator, 32, pairs), steps, each, rate)
                accuracy = accuracy_and_bits(model, test)[0]
                row.append(accuracy if np.isfinite(accuracy) else 0.0)
                largest[name].append(_largest_logit(model, test))
                gains += [layer.gain.max().item() for layer in model.layers if isinstance(layer, QKNormAttention)]
            rows.append(row)
    plain, unit = np.array(found["plain"]), np.array(found["unit"])
    better = seed_interval((unit.mean(1) - plain.mean(1)).tolist())
    return Evidence(
        measured={
            "accuracy, unit less plain, mean over rates": better.value,
            **{f"accuracy at {rate:g}, unit": float(unit[:, at].mean()) for at, rate in enumerate(_RATES)},
            "largest logit, unit": max(largest["unit"]),
            "largest gain": max(gains),
            "share of runs at chance, unit": float((unit < _CHANCE).mean()),
        },
        baseline={
            **{f"accuracy at {rate:g}, plain": float(plain[:, at].mean()) for at, rate in enumerate(_RATES)},
            "largest logit, plain": max(largest["plain"]),
            "share of runs at chance, plain": float((plain < _CHANCE).mean()),
        },
        expected="unit queries and keys recall better over the rates; logits stay within the gain",
        interval=(better.low, better.high),
        verdict=verdict_of(better.low, better.high),
        decides="accuracy, unit less plain, mean over rates",
        data=f"associative recall of {pairs} names and values, new texts in every step",
        model=f"{deep} layer(s) of 4 heads, 32 features, {steps} steps, {len(seeds)} seeds",
        notes="Recall in place of translation. Gradients are clipped at 1 for both, which hides divergence.",
        details={"accuracies": found},
    )


def _layer(name: str, length: int) -> Attention:
    shape = AttentionShape(32, 4)
    return Attention(shape, causal=True) if name == "plain" else QKNormAttention(shape, causal=True, length=length)


@torch.no_grad()
def _largest_logit(model: TinyTransformer, test: Batch) -> float:
    """The largest absolute logit of the first layer."""
    layer = model.layers[0]
    assert isinstance(layer, Attention)
    q, k, _, call = layer._prepared(model.norms[0](model.enter(test.inputs)), None)
    return layer.score(q, k, call).abs().max().item()
