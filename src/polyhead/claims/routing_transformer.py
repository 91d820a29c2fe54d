"""Routing: heads that meet by content recall what local heads and random meetings of as many tokens cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from polyhead.attention import Attention, AttentionShape, Call
from polyhead.attention.routing import RoutingAttention
from polyhead.claims._tiny_tasks import Batch, TinyTransformer, recall_batch, seed_interval, trained_accuracy
from polyhead.claims.base import Evidence, Scale, verdict_of

_SHAPE = AttentionShape(64, 4)
_VALUES = 16


class _RandomMeetings(RoutingAttention):
    """Routing heads whose clusters are drawn by place, once, in place of by content."""

    def _groups(self, keys: torch.Tensor, call: Call) -> torch.Tensor:
        groups = super()._groups(keys, call)
        generator = torch.Generator().manual_seed(1234)
        routed = groups.shape[1] - self.local_heads
        drawn = torch.randint(self.centroids.shape[1], (routed, groups.shape[2]), generator=generator)
        return torch.cat([groups[:, : self.local_heads], drawn.expand(len(groups), -1, -1)], 1)


def run(scale: Scale, seed: int) -> Evidence:
    """Accuracy of associative recall; the smaller of routing less random and random less local decides."""
    smoke = scale == "smoke"
    pairs, window, steps, depth = (16, 4, 120, 1) if smoke else (128, 16, 200, 2)
    clusters = 2 * pairs // window
    knobs: dict[str, Any] = {"causal": True, "clusters": clusters, "window": window, "decay": 0.99}
    kinds: dict[str, Callable[[], list[Attention]]] = {
        "local": lambda: [RoutingAttention(_SHAPE, **knobs, local_heads=4) for _ in range(depth)],
        "random": lambda: [_RandomMeetings(_SHAPE, **knobs) for _ in range(depth)],
        "routing": lambda: [RoutingAttention(_SHAPE, **knobs) for _ in range(depth)],
        "full": lambda: [Attention(_SHAPE, causal=True) for _ in range(depth)],
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for at in range(seed, seed + 3):
        test = recall_batch(torch.Generator().manual_seed(10_000 + at), 128 if smoke else 48, pairs, pairs, _VALUES)
        for name, make in kinds.items():
            torch.manual_seed(at)
            model = TinyTransformer(make(), pairs + _VALUES, _VALUES)
            found[name].append(_accuracy(model, test, pairs, steps, at))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    over_random = seed_interval([a - b for a, b in zip(found["routing"], found["random"], strict=True)])
    over_local = seed_interval([a - b for a, b in zip(found["random"], found["local"], strict=True)])
    least = min(over_random, over_local, key=lambda each: each.low)
    return Evidence(
        measured={"accuracy routing": means["routing"], "routing less random": over_random.value}
        | {"random less local": over_local.value, "least margin": least.value},
        baseline={f"accuracy {name}": means[name] for name in ("local", "random", "full")},
        expected="routing above random meetings above local windows, at the same number of attended pairs",
        interval=(least.low, least.high),
        verdict=verdict_of(least.low, least.high),
        decides="least margin",
        data=f"associative recall of {pairs} names and values, new texts in every step, 3 seeds",
        model=f"{depth} layers of 64 features and 4 heads, window {window}, {clusters} clusters",
        notes="Names and values share a token. Centroids move with decay 0.99, since training takes seconds.",
        details={"accuracies": found, "interval routing less random": [over_random.low, over_random.high]},
    )


def _accuracy(model: nn.Module, test: Batch, pairs: int, steps: int, seed: int) -> float:
    """Share of right answers with the centroids that training left."""

    def batch(generator: torch.Generator) -> Batch:
        return recall_batch(generator, 32, pairs, pairs, _VALUES)

    trained_accuracy(model, batch, test, steps, seed)
    asked = test.labels >= 0
    with torch.no_grad():
        right = model.eval()(test.inputs).argmax(-1) == test.labels
    return right[asked].float().mean().item()
