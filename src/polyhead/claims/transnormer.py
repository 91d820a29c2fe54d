"""TransNormer: a norm in place of the denominator bounds gradients and learns more than the divided form."""

from __future__ import annotations

import torch

from polyhead.attention import Attention, AttentionShape, LinearAttention
from polyhead.attention.transnormer import NormAttention, transnormer_layers
from polyhead.claims._tiny_tasks import recall_accuracies, seed_interval
from polyhead.claims.base import Evidence, Scale, verdict_of


def _pull(kind: type[Attention], seed: int) -> float:
    """Largest gradient of the heads with respect to keys, where features are small (states near -6)."""
    torch.manual_seed(seed)
    layer = kind(AttentionShape(8, 1), causal=True)
    q, k, v = torch.randn(3, 1, 1, 32, 8)
    q, k = q - 6, (k - 6).requires_grad_()
    call = layer._prepared(torch.zeros(1, 32, 8), None)[3]
    (slope,) = torch.autograd.grad(layer.attend(q, k, v, call).square().sum(), k)
    return slope.abs().max().item()


def run(scale: Scale, seed: int) -> Evidence:
    """Accuracy of associative recall, normalised less divided linear attention; gradients beside it."""
    shape, smoke = AttentionShape(32, 4), scale == "smoke"
    pairs = 12 if smoke else 24
    seeds = range(seed, seed + (3 if smoke else 6))
    found = recall_accuracies(
        {
            "divided": lambda: [LinearAttention(shape, causal=True) for _ in range(2)],
            "norm": lambda: [NormAttention(shape, causal=True) for _ in range(2)],
            "blocks and norm": lambda: transnormer_layers(shape, 2, causal=True, block=8),
            "softmax": lambda: [Attention(shape, causal=True) for _ in range(2)],
        },
        seeds,
        pairs,
        steps=100 if smoke else 400,
    )
    gain = seed_interval([a - b for a, b in zip(found["norm"], found["divided"], strict=True)])
    means = {name: sum(values) / len(values) for name, values in found.items()}
    pulls = {kind.name: [_pull(kind, each) for each in seeds] for kind in (LinearAttention, NormAttention)}
    return Evidence(
        measured={
            "accuracy norm": means["norm"],
            "accuracy blocks and norm": means["blocks and norm"],
            "difference": gain.value,
            "largest gradient norm": max(pulls["transnormer"]),
        },
        baseline={
            "accuracy divided": means["divided"],
            "accuracy softmax": means["softmax"],
            "largest gradient divided": max(pulls["linear"]),
        },
        expected="the normalised form above the divided one, with smaller gradients",
        interval=(gain.low, gain.high),
        verdict=verdict_of(gain.low, gain.high),
        decides="difference",
        data="associative recall of names and values, new texts in every step",
        model="two layers of 32 features and 4 heads",
        notes="Recall in place of language modelling; gradients at random states near -6, no training.",
        details={"accuracies": found, "gradients": pulls},
    )
