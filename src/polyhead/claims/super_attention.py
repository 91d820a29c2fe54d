"""Super attention: do fewer matrices match plain attention, and does a map between tokens beat it?"""

from __future__ import annotations

import numpy as np
import torch

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.super_attention import EfficientAttention, OptimisedAttention, SuperAttention
from polyhead.claims._tiny_tasks import TinyTransformer, digits_rows, seed_interval, trained_accuracy
from polyhead.claims.base import Evidence, Scale, verdict_of

_ALLOWED = 0.02
_KINDS = {"mha": Attention, "optimised": OptimisedAttention, "efficient": EfficientAttention, "super": SuperAttention}


def run(scale: Scale, seed: int) -> Evidence:
    """Digits row by row, one block of 4 heads: plain, optimised, efficient and super attention."""
    full = scale == "full"
    seeds, steps = range(seed, seed + (5 if full else 3)), 500 if full else 80
    found: dict[str, list[float]] = {name: [] for name in _KINDS}
    counts = {}
    for each in seeds:
        batch, test = digits_rows(each)
        for name, kind in _KINDS.items():
            torch.manual_seed(each)
            shape = AttentionShape(64, 4)
            layer = SuperAttention(shape, max_len=8) if kind is SuperAttention else kind(shape)
            counts[name] = float(sum(weight.numel() for weight in layer.parameters()))
            found[name].append(trained_accuracy(TinyTransformer([layer], 8, 10), batch, test, steps, each))
    gaps = {name: np.array(found[name]) - np.array(found["mha"]) for name in _KINDS if name != "mha"}
    above = {name: seed_interval((gap + (0 if name == "super" else _ALLOWED)).tolist()) for name, gap in gaps.items()}
    least = min(each.low for each in above.values()), min(each.high for each in above.values())
    return Evidence(
        measured={
            "smallest of all": min(each.value for each in above.values()),
            **{f"accuracy, {name}": float(np.mean(found[name])) for name in gaps},
            **{f"weights against mha, {name}": counts[name] / counts["mha"] for name in gaps},
        },
        baseline={"accuracy, mha": float(np.mean(found["mha"]))},
        expected=f"optimised and efficient lose less than {_ALLOWED} of accuracy to plain attention, super beats it",
        interval=least,
        verdict=verdict_of(*least),
        decides="smallest of all",
        data="digits of scikit-learn, 8 rows a text, 500 held out",
        model=f"1 block of 4 heads, 64 features, {steps} steps, {len(seeds)} seeds",
        notes="The 64-pixel form is left out for time.",
        details=dict(found),
    )
