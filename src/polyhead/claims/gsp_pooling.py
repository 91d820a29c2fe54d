"""Generalised sum pooling: leaving tokens behind that serve no class beats the mean, more so the more there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyhead.claims._metric_learning import by_class, recall_at_1
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.evaluate.vectors import unit
from polyhead.objectives import InfoNCE, Objective
from polyhead.pooling import AttentionPooler, GeneralizedSumPooler, MaxPooler, MeanPooler, Pooler, ZeroShotPrototypeLoss

_DIM, _TOKENS, _CLASSES, _EACH, _CLUSTERS = 32, 32, 20, 10, 6
_ARMS = ("mean", "max", "attention", "gsp", "gsp + zero-shot loss")


@dataclass(frozen=True)
class _Bags:
    """``states [bags, tokens, dim]`` of ``labels [bags]``; ``own [bags, tokens]``: which tokens are of the class."""

    states: Tensor
    labels: Tensor
    own: Tensor


def run(scale: Scale, seed: int) -> Evidence:
    """Recall@1 on unseen classes of made-up bags: generalised sum pooling less the mean.

    A bag has 32 tokens, some around its class's centre and the others around 6 centres that all classes share. A layer
    is trained on the tokens and one on the pooled vector, on half of the classes. Pooled mass 0.3, gamma 20, 16
    prototypes, fixed before. Decides: the difference with 24 shared tokens, by classes.
    """
    torch.set_num_threads(1)
    runs, steps = (2, 60) if scale == "smoke" else (5, 300)
    hits: dict[tuple[str, int], list[np.ndarray]] = {}
    weight: list[float] = []
    labels = torch.arange(_CLASSES).repeat_interleave(_EACH)
    for shared in (16, 24):
        for one in range(seed, seed + runs):
            train, test = (_bags(shared, [one, shared, part]) for part in (0, 1))
            for arm in _ARMS:
                model = _train(arm, train, steps, one)
                with torch.no_grad():
                    hits.setdefault((arm, shared), []).append(recall_at_1(model(test.states), test.labels))
                    if shared == 24 and isinstance(model.pooler, GeneralizedSumPooler):
                        given, _ = model.pooler.shares(model.tokens(test.states), torch.ones_like(test.own))
                        weight.append(float((given * test.own).sum(1).mean()))
    ahead = {count: np.subtract(hits["gsp", count], hits["mean", count]) for count in (16, 24)}
    gain = {count: by_class(each, labels, seed=seed) for count, each in ahead.items()}
    growth = by_class(ahead[24] - ahead[16], labels, seed=seed)
    found = {name: float(np.mean(each)) for name, each in hits.items()}
    return Evidence(
        measured={
            "recall@1 gsp, 24 of 32 shared": found["gsp", 24],
            "difference": gain[24].value,
            "difference at 24 less at 16": growth.value,
            "weight on the class's tokens": float(np.mean(weight)),
        },
        baseline={f"recall@1 {arm}, {count} shared": value for (arm, count), value in found.items() if arm != "gsp"},
        expected="a higher recall@1 than the mean, the more so the more tokens are shared; weight near 1 on own tokens",
        interval=(gain[24].low, gain[24].high),
        verdict=verdict_of(gain[24].low, gain[24].high),
        decides="difference",
        data=f"made up: {_CLASSES} classes to train on and {_CLASSES} unseen, {_EACH} bags each of {_TOKENS} tokens",
        model="a layer before the pooling and one after",
        notes="Made-up bags whose shared tokens have directions of their own; the paper's images are not tested.",
        details={
            "difference at 16, 95%": [gain[16].low, gain[16].high],
            "growth, 95%": [growth.low, growth.high],
            "share of the class's tokens": 0.25,
        },
    )


class _Model(nn.Module):
    def __init__(self, pooler: Pooler) -> None:
        super().__init__()
        self.tokens, self.pooler, self.after = nn.Linear(_DIM, _DIM), pooler, nn.Linear(_DIM, _DIM)

    def forward(self, states: Tensor) -> Tensor:
        """``[bags, dim]``."""
        return self.after(self.pooler(self.tokens(states), torch.ones(states.shape[:2])))


def _bags(shared: int, seed: list[int]) -> _Bags:
    """Bags of 20 classes; the shared centres are those of the run, whatever the part."""
    generator = np.random.default_rng(seed)
    around = unit(np.random.default_rng(seed[:1]).normal(size=(_CLUSTERS, _DIM)))
    centres = unit(generator.normal(size=(_CLASSES, _DIM)))
    labels = np.repeat(np.arange(_CLASSES), _EACH)
    states = around[generator.integers(_CLUSTERS, size=(len(labels), _TOKENS))]
    own = np.arange(_TOKENS) >= shared
    states[:, own] = centres[labels][:, None]
    states = states + generator.normal(size=states.shape) * 0.15
    return _Bags(
        torch.tensor(states, dtype=torch.float32), torch.tensor(labels), torch.tensor(np.tile(own, (len(labels), 1)))
    )


def _train(arm: str, data: _Bags, steps: int, seed: int) -> _Model:
    """Trained on batches of 10 classes, 4 bags each."""
    torch.manual_seed(seed)
    poolers: dict[str, Callable[[], Pooler]] = {
        "mean": MeanPooler,
        "max": MaxPooler,
        "attention": lambda: AttentionPooler(_DIM, 4),
    }
    model = _Model(poolers[arm]() if arm in poolers else GeneralizedSumPooler(_DIM, 16))
    extra = ZeroShotPrototypeLoss(_CLASSES) if "zero-shot" in arm else None
    objective = Objective(InfoNCE(temperature=0.1))
    own = [*model.pooler.parameters(), *(extra.parameters() if extra else [])]
    others = [*model.tokens.parameters(), *model.after.parameters()]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": own, "lr": 3e-2}]
    optimizer = torch.optim.Adam(groups, lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        classes = torch.randperm(_CLASSES, generator=generator)[:10]
        rows = (
            classes[:, None] * _EACH + torch.randint(_EACH - 3, (10, 1), generator=generator) + torch.arange(4)
        ).flatten()
        states, labels = data.states[rows], data.labels[rows]
        loss = objective(model(states), labels)
        if extra is not None and isinstance(model.pooler, GeneralizedSumPooler):
            _, shares = model.pooler.shares(model.tokens(states), torch.ones(states.shape[:2], dtype=torch.bool))
            loss = loss + 0.1 * extra(shares, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
