"""MHE: how much of many heads is kept by one projection and a vector a head, and is multiplying the better way?"""

from __future__ import annotations

import numpy as np
import torch

from polyhead.attention import Attention, AttentionShape, GroupedQueryAttention
from polyhead.attention.mhe import HeadEmbeddingAttention
from polyhead.claims._tiny_tasks import TinyTransformer, digits_rows, seed_interval, trained_accuracy
from polyhead.claims.base import Evidence, Scale, verdict_of

_ALLOWED = 0.01
_KINDS = ("8 heads", "1 head", "MQA", "no embeddings", "add", "mul")


def _layer(name: str) -> Attention:
    shape = AttentionShape(64, 8)
    if name == "8 heads":
        return Attention(shape)
    if name == "1 head":
        return Attention(AttentionShape(64, 1, head_dim=8))
    if name == "MQA":
        return GroupedQueryAttention(AttentionShape(64, 8, kv_heads=1))
    if name == "no embeddings":
        layer = HeadEmbeddingAttention(shape, mode="add", spread=0.0)
        layer.embeddings.requires_grad_(False)
        return layer
    return HeadEmbeddingAttention(shape, mode="add" if name == "add" else "mul")


def run(scale: Scale, seed: int) -> Evidence:
    """Digits row by row with 8 heads of 8 features: full, one, shared keys, one projection with and without vectors."""
    full = scale == "full"
    seeds, steps, deep = range(seed, seed + (5 if full else 3)), 400 if full else 80, 2 if full else 1
    found: dict[str, list[float]] = {name: [] for name in _KINDS}
    for each in seeds:
        batch, test = digits_rows(each)
        for name in _KINDS:
            torch.manual_seed(each)
            model = TinyTransformer([_layer(name) for _ in range(deep)], 8, 10)
            found[name].append(trained_accuracy(model, batch, test, steps, each))
    right = {name: np.array(values) for name, values in found.items()}
    better = seed_interval((right["mul"] - right["add"] + _ALLOWED).tolist())
    useful = seed_interval((right["add"] - right["no embeddings"]).tolist())
    both = min(better.low, useful.low), min(better.high, useful.high)
    counts = {name: float(sum(weight.numel() for weight in _layer(name).parameters())) for name in _KINDS}
    return Evidence(
        measured={
            "smaller of both": min(better.value, useful.value),
            f"mul against add, plus the {_ALLOWED} allowed": better.value,
            "add against no embeddings": useful.value,
            "accuracy kept of 8 heads, mul": float(right["mul"].mean() / right["8 heads"].mean()),
            **{f"accuracy, {name}": float(right[name].mean()) for name in ("add", "mul")},
            "weights against 8 heads, mul": counts["mul"] / counts["8 heads"],
        },
        baseline={f"accuracy, {name}": float(right[name].mean()) for name in _KINDS if name not in ("add", "mul")},
        expected=f"vectors beat none, and mul loses less than {_ALLOWED} to add",
        interval=both,
        verdict=verdict_of(*both),
        decides="smaller of both",
        data="digits of scikit-learn, 8 rows a text, 500 held out",
        model=f"{deep} layer(s), 64 features, {steps} steps, {len(seeds)} seeds",
        notes="Digits alone; the characters of the row's check are left out for time.",
        details={"accuracies": found, "weights": counts},
    )
