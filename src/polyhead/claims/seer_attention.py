"""SeerAttention: a trained gate keeps more of the true attention than pooled queries and keys without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyhead.attention.seer_gates import ModelGates
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

_BLOCK = 16
_SHARES = (0.5, 0.25, 0.1)


def run(scale: Scale, seed: int) -> Evidence:
    """Gemma-3-270M: mass in the quarter of blocks a gate picks, less in what the better of two heuristics picks."""
    smoke = scale == "smoke"
    model = loaded("gemma-3-270m", lm_head=not smoke)
    tokens, train, held = (160, 4, 3) if smoke else (512, 24, 10)
    rows = _rows(model, tokens, train + held, seed)
    gates = ModelGates(_BLOCK, steps=60 if smoke else 150, seed=seed).fit(model, rows[:train])
    kept = np.array([_kept(model, gates, row, seed) for row in rows[train:]])  # [texts, ways, shares]
    means = kept.mean(0)
    gate, pooled, near = (kept[:, _WAYS.index(way), 1] for way in ("gate", "pooled", "first and nearest"))
    gap = gate - np.maximum(pooled, near)
    random = np.random.default_rng(seed)
    low, high = np.quantile(gap[random.integers(0, len(gap), (5_000, len(gap)))].mean(1), (0.025, 0.975))
    named = {f"{way} at {share}": float(means[a, b]) for a, way in enumerate(_WAYS) for b, share in enumerate(_SHARES)}
    details: dict[str, Any] = {"divergence after each pass": gates.losses_}
    if not smoke:
        details["nats a token"] = _losses(model, gates, rows[train:])
    return Evidence(
        measured={"difference": float(gap.mean())} | {k: v for k, v in named.items() if k.startswith("gate")},
        baseline={k: v for k, v in named.items() if not k.startswith("gate")},
        expected="at a quarter of the blocks the gate keeps more attention mass than untrained pooled products and "
        "than the first block with the nearest, and all more than random ones",
        interval=(float(low), float(high)),
        verdict=verdict_of(float(low), float(high)),
        decides="difference",
        data=f"news items joined to {tokens} tokens, {train} to train on, {held} to test, blocks of {_BLOCK}",
        model=model.name,
        notes="Mass is the mean over layers, heads and tokens after the first block; the own block always counts among "
        "the chosen. The oracle takes the blocks of most mass. No time is measured here. A first rule asked for more "
        "than pooled products only, and held; that the first block with the nearest kept more than both was seen then.",
        details=details,
    )


_WAYS = ("gate", "pooled", "first and nearest", "random", "oracle")


def _rows(model: HeadedModel, tokens: int, count: int, seed: int) -> list[list[int]]:
    from polyhead.data import load_texts

    texts = load_texts("ag-news", 2_000)
    order = np.random.default_rng(seed).permutation(len(texts))
    ids = [token for at in order for token in model.tokenizer(texts[at] + "\n", add_special_tokens=False)["input_ids"]]
    begin = [model.tokenizer.bos_token_id]
    return [begin + ids[at * (tokens - 1) : (at + 1) * (tokens - 1)] for at in range(count)]


@torch.no_grad()
def _kept(model: HeadedModel, gates: ModelGates, row: list[int], seed: int) -> np.ndarray:
    """``[ways, shares]`` mass kept in one text."""
    from polyhead.tap import AttentionCall, attention_weights, tapped

    found: list[np.ndarray] = []
    generator = torch.Generator().manual_seed(seed)

    def watch(call: AttentionCall) -> None:
        gate = gates.gates_[len(found)]
        weights = attention_weights(call)
        blocks = weights.unflatten(3, (-1, _BLOCK)).sum(4).unflatten(2, (-1, _BLOCK)).mean(3)  # mass of blocks
        count = blocks.shape[2]
        q, k = call.query.unflatten(2, (-1, _BLOCK)).mean(3), call.key.unflatten(2, (-1, _BLOCK)).mean(3)
        near = -(torch.arange(count)[:, None] - torch.arange(count)).abs().float()
        near[:, 0] = 1.0
        ways = {
            "gate": gate(call.query, call.key),
            "pooled": q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(2, 3),
            "first and nearest": near.expand_as(blocks),
            "random": torch.rand(blocks.shape, generator=generator),
            "oracle": blocks,
        }
        found.append(np.array([[_mass(ways[way], blocks, share) for share in _SHARES] for way in _WAYS]))

    with tapped(model.module, watch):
        model(input_ids=torch.tensor([row]))
    return np.mean(found, 0)


def _mass(scores: torch.Tensor, blocks: torch.Tensor, share: float) -> float:
    """Mass in the best ``share`` of the blocks a row may see, the own one among them."""
    count = blocks.shape[2]
    here = torch.arange(count)
    scores = scores.masked_fill(here[:, None] == here, torch.inf).masked_fill(here[:, None] < here, -torch.inf)
    allowed = (share * (here + 1)).ceil().clamp_min(1)
    ranks = scores.argsort(-1, descending=True).argsort(-1)
    return float((blocks * (ranks < allowed[:, None])).sum(-1)[:, :, 1:].mean())


@torch.no_grad()
def _losses(model: HeadedModel, gates: ModelGates, rows: list[list[int]]) -> dict[str, float]:
    """Loss a token with the gates' choice of so many blocks before the own."""
    found = {"whole": _loss(model, rows)}
    for gates.keep in (16, 8, 3):
        with gates.on(model):
            found[f"{gates.keep} of 31 blocks"] = _loss(model, rows)
    return found


def _loss(model: HeadedModel, rows: list[list[int]]) -> float:
    losses = []
    for row in rows:
        ids = torch.tensor([row])
        logits = model(input_ids=ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:]).item())
    return float(np.mean(losses))
