"""Fastmax: the second-order polynomial comes nearer to softmax than linear features do."""

from __future__ import annotations

from polyhead.attention import Attention, AttentionShape, LinearAttention
from polyhead.attention.fastmax import FastmaxAttention
from polyhead.claims._tiny_tasks import recall_accuracies, seed_interval
from polyhead.claims.base import Evidence, Scale, verdict_of


def run(scale: Scale, seed: int) -> Evidence:
    """Accuracy of associative recall, order 2 less softmax: not more than 0.05 below is comparable."""
    shape = AttentionShape(32, 4)
    smoke = scale == "smoke"
    found = recall_accuracies(
        {
            "softmax": lambda: [Attention(shape, causal=True)],
            "linear": lambda: [LinearAttention(shape, causal=True)],
            "order 1": lambda: [FastmaxAttention(shape, causal=True, order=1)],
            "order 2": lambda: [FastmaxAttention(shape, causal=True, order=2)],
        },
        range(seed, seed + (3 if smoke else 6)),
        pairs=12 if smoke else 24,
        steps=120 if smoke else 400,
    )
    gap = seed_interval([a - b for a, b in zip(found["order 2"], found["softmax"], strict=True)])
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return Evidence(
        measured={"accuracy order 2": means["order 2"], "accuracy order 1": means["order 1"], "difference": gap.value},
        baseline={"accuracy softmax": means["softmax"], "accuracy linear": means["linear"]},
        expected="order 2 not more than 0.05 below softmax, and above order 1 and linear",
        interval=(gap.low, gap.high),
        verdict=verdict_of(gap.low, gap.high, more_than=-0.05),
        decides="difference",
        data="associative recall of names and values, new texts in every step",
        model="one layer of 32 features and 4 heads",
        notes="Names and values share a token. Speed and Long Range Arena are not measured here.",
        details={"accuracies": found},
    )
