"""LAMA: low-rank heads that share factors classify as well as full bilinear heads with a fraction of the weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from polyhead.claims._pooling import MODEL, labelled, train_classes
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.evaluate.statistics import Interval, bootstrap_interval
from polyhead.pooling import AttentionPooler, LowRankPooler, MaxPooler, MeanPooler, Pooler
from polyhead.pooling.base import softmax_over_tokens

_DIM, _HEADS, _WITHIN = 384, 8, 0.005


def run(scale: Scale, seed: int) -> Evidence:
    """Accuracy on AG News and Banking77 of 8 low-rank heads less 8 full bilinear heads, states frozen.

    Each pooling is trained with a linear classifier on its output. Decides: the difference, by texts of both sets;
    supported where it is above minus half a point with the whole interval.
    """
    torch.set_num_threads(1)
    smoke = scale == "smoke"
    count, runs, steps = (200, 2, 40) if smoke else (2000, 5, 500)
    arms: dict[str, Callable[[], Pooler]] = {
        "mean": MeanPooler,
        "max": MaxPooler,
        "one query": lambda: AttentionPooler(_DIM),
        "full bilinear": _FullBilinear,
        "low rank, 4 heads": lambda: LowRankPooler(_DIM, 4),
        "low rank": lambda: LowRankPooler(_DIM, _HEADS),
    }
    hits: dict[str, list[np.ndarray]] = {name: [] for name in arms}
    for name in ("ag-news", "banking77"):
        data = labelled(name, count, count, seed)
        for arm, make in arms.items():
            found = []
            for one in range(seed, seed + runs):
                torch.manual_seed(one)
                found.append(train_classes(make(), data, steps=steps, seed=one))
            hits[arm].append(np.mean(found, axis=0))
    accuracy = {arm: float(np.mean(np.concatenate(each))) for arm, each in hits.items()}
    weights = {arm: sum(weight.numel() for weight in make().parameters()) for arm, make in arms.items()}
    gap = _difference(hits["low rank"], hits["full bilinear"], seed)
    mean = _difference(hits["low rank"], hits["mean"], seed)
    return Evidence(
        measured={
            "accuracy low rank": accuracy["low rank"],
            "difference": gap.value,
            "low rank less mean": mean.value,
            "share of full bilinear weights": weights["low rank"] / weights["full bilinear"],
        },
        baseline={f"accuracy {arm}": value for arm, value in accuracy.items() if arm != "low rank"},
        expected="within half a point of full bilinear heads at a fifth of their weights or less, not below the mean",
        interval=(gap.low, gap.high),
        verdict=verdict_of(gap.low, gap.high, more_than=-_WITHIN),
        decides="difference",
        data=f"ag-news and banking77 (20 intents), {count} texts each to train on and to judge",
        model=f"{MODEL}, frozen",
        notes=(
            "States of a frozen Transformer in place of a recurrent network trained with the pooling; SST-2 is not at "
            "hand. Poolings of several heads give the classifier as many times the numbers of the mean."
        ),
        details={
            "low rank less mean, 95%": [mean.low, mean.high],
            "weights of the pooling": weights,
            "by set": {arm: [float(np.mean(each)) for each in values] for arm, values in hits.items()},
        },
    )


class _FullBilinear(Pooler):
    """The same pooling with a whole matrix a head."""

    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.randn(_HEADS, _DIM, _DIM) / _DIM)

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """``[batch, heads, dim]``."""
        context = MeanPooler().pool(states, counted, positions)
        scores = torch.einsum("bd,hde,bte->bth", context, self.matrices, states)
        scores = functional.normalize(scores.tanh(), dim=-1)
        return softmax_over_tokens(scores, counted).transpose(1, 2) @ states


def _difference(found: list[np.ndarray], other: list[np.ndarray], seed: int) -> Interval:
    return bootstrap_interval(np.concatenate(found) - np.concatenate(other), seed=seed)
