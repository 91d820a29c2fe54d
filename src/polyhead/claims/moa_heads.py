"""MoA: do four heads of sixteen experts a token predict characters better than four heads, near to sixteen?"""

from __future__ import annotations

import numpy as np
import torch

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.moa_heads import MixtureOfAttentionHeads, expert_use
from polyhead.claims._tiny_tasks import (
    Batch,
    TinyTransformer,
    accuracy_and_bits,
    character_batches,
    seed_interval,
    train,
)
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.positions import RotaryPositions


def _layer(name: str) -> Attention:
    positions = RotaryPositions(8)
    if name.startswith("MHA"):
        return Attention(AttentionShape(32, int(name[4:]), head_dim=8), causal=True, positions=positions)
    experts = 32 if "32" in name else 16
    return MixtureOfAttentionHeads(AttentionShape(32, 4, head_dim=8), causal=True, positions=positions, experts=experts)


def run(scale: Scale, seed: int) -> Evidence:
    """Bits a character of 4 and 16 heads and of 4 experts of 16 (and 32) a token, with and without the balance loss."""
    full = scale == "full"
    kinds = ("MHA-4", "MHA-16", "MoA 4 of 16", "MoA 4 of 16, no balance") + (("MoA 4 of 32",) if full else ())
    seeds, steps = range(seed, seed + (5 if full else 3)), 400 if full else 50
    batch, test = character_batches(12, 48)
    bits: dict[str, list[float]] = {name: [] for name in kinds}
    use: dict[str, list[float]] = {name: [] for name in kinds if "MoA" in name}
    for each in seeds:
        for name in kinds:
            torch.manual_seed(each)
            model = TinyTransformer([_layer(name) for _ in range(2)], 40, 40)
            train(model, batch, steps, each, 1e-2, balance=float("MoA" in name and "no balance" not in name))
            bits[name].append(accuracy_and_bits(model, test)[1])
            if name in use:
                use[name].append(_use_entropy(model, test))
    saved = seed_interval((np.array(bits["MHA-4"]) - np.array(bits["MoA 4 of 16"])).tolist())
    return Evidence(
        measured={
            "bits saved by 4 of 16 against MHA-4": saved.value,
            **{f"bits, {name}": float(np.mean(bits[name])) for name in use},
            **{f"entropy of use in bits, {name}": float(np.mean(values)) for name, values in use.items()},
        },
        baseline={f"bits, {name}": float(np.mean(bits[name])) for name in ("MHA-4", "MHA-16")},
        expected="four of sixteen experts a token need fewer bits than four heads; without balance use is less even",
        interval=(saved.low, saved.high),
        verdict=verdict_of(saved.low, saved.high),
        decides="bits saved by 4 of 16 against MHA-4",
        data="characters of AG News, stretches of 48",
        model=f"2 layers of 32 features, heads of 8, {steps} steps, {len(seeds)} seeds",
        notes="Experts share one key and value head, plain heads have their own. Entropy of use (at most 4 bits for 16 "
        "experts) does not decide.",
        details={"bits": bits, "entropy": use},
    )


@torch.no_grad()
def _use_entropy(model: TinyTransformer, test: Batch) -> float:
    """Entropy in bits of how often each expert is among the chosen, mean over layers."""
    found: list[float] = []

    def note(layer: MixtureOfAttentionHeads, given: tuple[torch.Tensor]) -> None:
        share = expert_use(layer, given[0])
        found.append(-(share * share.clamp_min(1e-12).log2()).sum().item())

    hooks = [layer.register_forward_pre_hook(note) for layer in model.layers]
    model(test.inputs)
    for hook in hooks:
        hook.remove()
    return float(np.mean(found))
