"""InLine attention: subtraction lets weights depend on a query's length, which division hides."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.attention import Attention, AttentionShape, LinearAttention
from polyhead.attention.call import Call
from polyhead.attention.inline_attention import InLineAttention
from polyhead.claims._tiny_tasks import Batch, seed_interval, trained_accuracy
from polyhead.claims.base import Evidence, Scale, verdict_of


class _Divided(LinearAttention):
    """Linear attention on ``relu``: the same weights for a query of any length."""

    name = "claim-relu"

    def features(self, states: torch.Tensor, role: str) -> torch.Tensor:
        return F.relu(states)


def _lengths(generator: torch.Generator, count: int) -> Batch:
    """One of eight directions, of length 1 or 3; which of the two lengths is it?"""
    long = torch.randint(2, (count, 1), generator=generator)
    directions = torch.eye(16)[torch.randint(8, (count, 1), generator=generator)]
    return Batch(directions * (1.0 + 2.0 * long[..., None]), long)


def run(scale: Scale, seed: int) -> Evidence:
    """Accuracy of one attention layer without residual path on telling a long query from a short one.

    The asking token is none of the keys, so that only the weights can carry its length.
    """
    seeds = range(seed, seed + (3 if scale == "smoke" else 8))
    steps = 150 if scale == "smoke" else 500
    found: dict[str, list[float]] = {"softmax": [], "divided": [], "inline": []}
    kinds: dict[str, type[Attention]] = {"softmax": Attention, "divided": _Divided, "inline": InLineAttention}
    for each in seeds:
        test = _lengths(torch.Generator().manual_seed(10_000 + each), 1_000)
        for name, kind in kinds.items():
            torch.manual_seed(each)
            model = _Asked(kind(AttentionShape(16, 2)))
            found[name].append(
                trained_accuracy(model, lambda generator: _lengths(generator, 64), test, steps, each, 1e-2)
            )
    gain = seed_interval([a - b for a, b in zip(found["inline"], found["divided"], strict=True)])
    means = {name: sum(values) / len(values) for name, values in found.items()}
    return Evidence(
        measured={"accuracy inline": means["inline"], "difference": gain.value},
        baseline={"accuracy divided": means["divided"], "accuracy softmax": means["softmax"]},
        expected="division at chance (0.5) for the length of a query, InLine above it",
        interval=(gain.low, gain.high),
        verdict=verdict_of(gain.low, gain.high),
        decides="difference",
        data="eight directions of two lengths, a context of eleven random tokens",
        model="one attention layer of 2 heads and a readout, no residual path",
        notes="Tests the paper's explanation, not its image models.",
        details={"accuracies": found},
    )


class _Asked(nn.Module):
    """A token asks a context of eleven that is always the same; two layers read the answer out."""

    def __init__(self, layer: Attention) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("context", torch.randn(1, 11, 16))
        self.leave = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, 1, 2]``."""
        q = self.layer.project(inputs)[0]
        _, k, v = self.layer.project(self.get_buffer("context").expand(len(inputs), -1, -1))
        call = Call(inputs, torch.zeros(1, 1), torch.arange(11)[None])
        logits: torch.Tensor = self.leave(self.layer.output(self.layer.attend(q, k, v, call), call))
        return logits
