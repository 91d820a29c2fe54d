"""LongHeads: without training, chosen chunks at near positions recall in texts longer than any trained on."""

from __future__ import annotations

import torch

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.longheads import LongHeadsAttention
from polyhead.attention.moa_sparse import ElasticSpan, SpanAttention
from polyhead.claims._tiny_tasks import Batch, TinyTransformer, recall_batch, seed_interval, trained_accuracy
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.positions import RotaryPositions

_SHAPE = AttentionShape(64, 4)
_NAMES, _VALUES, _SINKS = 256, 16, 4


def run(scale: Scale, seed: int) -> Evidence:
    """Recall at twice the trained length; LongHeads less the better of plain attention and a window decides."""
    smoke = scale == "smoke"
    pairs, chunk, steps = (16, 4, 300) if smoke else (64, 16, 500)
    longer, budget = (1, 2, 4), 2 * pairs
    found: dict[str, list[float]] = {}
    for at in range(seed, seed + 3):
        torch.manual_seed(at)
        trained = _model([Attention(_SHAPE, causal=True, positions=_rotary()) for _ in range(2)])
        first = _drawn(torch.Generator().manual_seed(10_000 + at), 64, pairs)
        trained_accuracy(trained, lambda generator: _drawn(generator, 32, pairs), first, steps, at)
        for times in longer:
            test = _drawn(torch.Generator().manual_seed(20_000 + at), 64 if smoke else 24, pairs * times)
            for name, layers in _ways(chunk, budget).items():
                model = _model(layers)
                model.load_state_dict(trained.state_dict())
                found.setdefault(f"{name}, length x{times}", []).append(_accuracy(model, test))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    ours, plain, window = (found[f"{name}, length x2"] for name in ("longheads", "plain", "window"))
    margin = seed_interval([a - max(b, c) for a, b, c in zip(ours, plain, window, strict=True)])
    return Evidence(
        measured={name: value for name, value in means.items() if name.startswith("longheads")}
        | {"margin": margin.value},
        baseline={name: value for name, value in means.items() if not name.startswith("longheads")},
        expected="at twice the length plain attention and a window with sinks fall, LongHeads stays high, and a choice "
        "a head is no worse than one for all",
        interval=(margin.low, margin.high),
        verdict=verdict_of(margin.low, margin.high),
        decides="margin",
        data=f"associative recall, trained with {pairs} names and values, 3 seeds",
        model=f"two layers of 64 features and 4 heads with rotary positions; chunks of {chunk}, budget {budget}",
        notes="Names and values share a token. All ways have the same trained weights.",
        details={"accuracies": found},
    )


def _ways(chunk: int, budget: int) -> dict[str, list[Attention]]:
    spans = [ElasticSpan(budget - _SINKS)] * _SHAPE.heads
    return {
        "plain": [Attention(_SHAPE, causal=True, positions=_rotary()) for _ in range(2)],
        "window": [SpanAttention(_SHAPE, positions=_rotary(), spans=spans, sinks=_SINKS) for _ in range(2)],
        "longheads": [LongHeadsAttention(_SHAPE, positions=_rotary(), chunk=chunk, budget=budget) for _ in range(2)],
        "longheads, one choice": [
            LongHeadsAttention(_SHAPE, positions=_rotary(), chunk=chunk, budget=budget, per_head=False)
            for _ in range(2)
        ],
    }


def _rotary() -> RotaryPositions:
    return RotaryPositions(_SHAPE.size)


def _drawn(generator: torch.Generator, count: int, pairs: int) -> Batch:
    return recall_batch(generator, count, pairs, _NAMES, _VALUES)


def _model(layers: list[Attention]) -> TinyTransformer:
    return TinyTransformer(layers, _NAMES + _VALUES, _VALUES)


@torch.no_grad()
def _accuracy(model: TinyTransformer, test: Batch) -> float:
    right = model(test.inputs).argmax(-1) == test.labels
    return right[test.labels >= 0].float().mean().item()
