"""Causal head gating: switching off heads it calls facilitating costs more than switching off heads at random."""

from __future__ import annotations

import numpy as np

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.data import load_sts
from polyhead.heads.gating_roles import CausalHeadGating, Role
from polyhead.heads.importance import task_losses
from polyhead.heads.suffix import every_head
from polyhead.heads.tasks import PairSimilarity
from polyhead.model import HeadedModel

OFF = 5
ROLES: tuple[Role, ...] = ("facilitating", "interfering", "irrelevant")


def run(scale: Scale, seed: int) -> Evidence:
    """Rise of the held-out loss without the 5 most facilitating heads, less the mean rise without 5 random heads.

    all-MiniLM-L6-v2; gates are learned on STS 2014 similarity, ablation is judged on STS 2015. The paper's setting is
    next-token loss of Llama 3 models.
    """

    model, full = loaded("all-MiniLM-L6-v2"), scale == "full"
    learn = PairSimilarity(load_sts(2014).sample(96 if full else 32, seed), batch_size=8)
    held_out = PairSimilarity(load_sts(2015).sample(200 if full else 48, seed), batch_size=16)
    scorer = CausalHeadGating(steps=100 if full else 16, rate=0.1 if full else 0.4, seed=seed)
    roles = scorer.roles(model, learn)
    whole = task_losses(model, held_out)
    rises = {}
    for role in ROLES:
        order = np.argsort(-roles.of(role).ravel(), kind="stable")[:OFF]
        rises[role] = _rise(model, held_out, whole, [(int(i) // model.heads, int(i) % model.heads) for i in order])
    generator, heads = np.random.default_rng(seed), every_head(model)
    draws = [
        _rise(model, held_out, whole, [heads[i] for i in generator.choice(len(heads), OFF, replace=False)])
        for _ in range(20 if full else 6)
    ]
    low, high = _interval(rises["facilitating"], np.stack(draws), seed)
    random = float(np.mean(draws))
    return Evidence(
        measured={
            "difference": float(rises["facilitating"].mean()) - random,
            **{f"rise of the loss, 5 {role} heads off": float(rises[role].mean()) for role in ROLES},
        },
        baseline={"loss of the whole model": float(whole.mean()), "rise, 5 random heads off": random},
        expected="the loss rises more without facilitating heads than without random ones; for the others it does not",
        interval=(low, high),
        verdict=verdict_of(low, high),
        decides="difference",
        data=f"gates: {len(learn.data)} pairs of STS 2014; judged: {len(held_out.data)} of 2015; {len(draws)} draws",
        model=model.name,
        notes="A sentence encoder on similarity, not a Llama on next tokens; the smoke scale learns for 16 steps only.",
        details={
            "heads above 0.5": {role: int((roles.of(role) > 0.5).sum()) for role in ROLES},
            "loss of the fits": {name: [losses[0], losses[-1]] for name, losses in roles.losses.items()},
        },
    )


def _rise(model: HeadedModel, task: PairSimilarity, whole: np.ndarray, heads: list[tuple[int, int]]) -> np.ndarray:
    from polyhead.act.gate import Gate

    with Gate.off(heads, model).on(model):
        return task_losses(model, task) - whole


def _interval(one: np.ndarray, draws: np.ndarray, seed: int, resamples: int = 2000) -> tuple[float, float]:
    """95% bootstrap interval of a mean rise less the draws', over pairs and draws."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        rows = generator.integers(0, len(one), len(one))
        chosen = generator.integers(0, len(draws), len(draws))
        found.append(one[rows].mean() - draws[chosen][:, rows].mean())
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
