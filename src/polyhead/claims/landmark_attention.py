"""Landmarks: fetching two blocks by their landmarks recalls nearly what seeing all does, and mean keys do not."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.based import SlidingWindowAttention
from polyhead.attention.landmark import LandmarkAttention, insert_landmarks
from polyhead.claims._tiny_tasks import Batch, TinyTransformer, recall_batch, seed_interval, trained_accuracy
from polyhead.claims.base import Evidence, Scale, verdict_of

_SHAPE = AttentionShape(64, 4)
_VALUES = 16
_NEAR = 0.1


class _MeanKeys(LandmarkAttention):
    """Blocks are fetched by the mean of their keys."""

    def rank(self, q: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        return q @ blocks[:, :, :, :-1].mean(3).transpose(2, 3)


class _Random(LandmarkAttention):
    """Blocks are fetched at random."""

    def rank(self, q: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.rand(*q.shape[:3], blocks.shape[2], generator=generator)


def run(scale: Scale, seed: int) -> Evidence:
    """Accuracy of recall with two blocks fetched, by landmark against by mean key and against all, decides."""
    smoke = scale == "smoke"
    every, pairs, steps, names = (4, 16, 160, 128) if smoke else (16, 64, 400, 256)
    longer = (1, 2) if smoke else (1, 2, 4)
    choices: dict[str, tuple[type[LandmarkAttention], int | None]] = {
        "all blocks": (LandmarkAttention, None),
        "landmarks, 2 blocks": (LandmarkAttention, 2),
        "landmarks, 4 blocks": (LandmarkAttention, 4),
        "mean keys, 2 blocks": (_MeanKeys, 2),
        "random, 2 blocks": (_Random, 2),
    }
    found: dict[str, list[float]] = {}
    for at in range(seed, seed + 3):
        torch.manual_seed(at)
        plain = _model(every, names, Attention(_SHAPE, causal=True))
        marked = _model(every, names, LandmarkAttention(_SHAPE, every=every))
        tests = [
            _drawn(torch.Generator().manual_seed(10_000 + at), 128 if smoke else 24, pairs * times, every, names)
            for times in longer
        ]
        for model in (plain, marked):
            trained_accuracy(model, lambda generator: _drawn(generator, 32, pairs, every, names), tests[0], steps, at)
        for times, test in zip(longer, tests, strict=True):
            found.setdefault(f"plain attention, length x{times}", []).append(_accuracy(plain, test))
            for name, (kind, top) in choices.items():
                model = _model(every, names, kind(_SHAPE, every=every, top=top))
                model.load_state_dict(marked.state_dict())
                found.setdefault(f"{name}, length x{times}", []).append(_accuracy(model, test))
    means = {name: sum(values) / len(values) for name, values in found.items()}
    own, whole, mean = (
        found[f"{name}, length x1"] for name in ("landmarks, 2 blocks", "all blocks", "mean keys, 2 blocks")
    )
    margins = [min(a - c, a - b + _NEAR) for a, b, c in zip(own, whole, mean, strict=True)]
    margin = seed_interval(margins)
    return Evidence(
        measured={name: value for name, value in means.items() if name.startswith("landmarks")}
        | {"margin": margin.value},
        baseline={name: value for name, value in means.items() if not name.startswith("landmarks")},
        expected=f"two blocks by landmark within {_NEAR} of all blocks, and above two blocks by mean key",
        interval=(margin.low, margin.high),
        verdict=verdict_of(margin.low, margin.high),
        decides="margin",
        data=f"associative recall of {pairs} names and values in blocks of {every}, 3 seeds",
        model="two layers of 64 features and 4 heads, no positions: a window of one block, then the layer compared",
        notes="The margin of a seed is the smaller of both. Longer texts are not seen in training, and do not decide.",
        details={"accuracies": found},
    )


def _drawn(generator: torch.Generator, count: int, pairs: int, every: int, names: int) -> Batch:
    """Recall with a landmark, a feature of its own, after every block."""
    drawn = recall_batch(generator, count, pairs, names, _VALUES)
    inputs = F.pad(drawn.inputs, (0, 1))
    mark = F.one_hot(torch.tensor(inputs.shape[2] - 1), inputs.shape[2]).float()
    labels = insert_landmarks(drawn.labels, -1, every)
    return Batch(insert_landmarks(inputs, mark, every), labels)


def _model(every: int, names: int, last: Attention) -> TinyTransformer:
    """A window of one block, in which landmarks read what they stand for, then the layer that is compared."""
    first = SlidingWindowAttention(_SHAPE, causal=True, window=every + 1)
    return TinyTransformer([first, last], names + _VALUES + 1, _VALUES)


def _accuracy(model: TinyTransformer, test: Batch) -> float:
    with torch.no_grad():
        right = model(test.inputs).argmax(-1) == test.labels
    return right[test.labels >= 0].float().mean().item()
