"""EIT: do heads that meet each other predict characters better, and agree more?"""

from __future__ import annotations

import numpy as np
import torch

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.eit import EnhancedInteractiveAttention, head_consensus
from polyhead.claims._tiny_tasks import TinyTransformer, accuracy_and_bits, character_batches, seed_interval, train
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.positions import RotaryPositions


def _layer(name: str) -> Attention:
    shape = AttentionShape(32, 4)
    positions = RotaryPositions(shape.size)
    if name == "MHA":
        return Attention(shape, causal=True, positions=positions)
    layer = EnhancedInteractiveAttention(shape, causal=True, positions=positions, efficient=name == "efficient")
    if name == "no cross stage":
        _fix_cross(layer)
    return layer


@torch.no_grad()
def _fix_cross(layer: EnhancedInteractiveAttention) -> None:
    """Each head's map goes through the cross stage as it is, and the stage does not learn."""
    each = torch.arange(len(layer.cross_out))
    for weight, rows, columns in ((layer.cross_in, 2 * each, each), (layer.cross_out, each, 2 * each)):
        step = (1, 0) if weight is layer.cross_in else (0, 1)
        weight.zero_().requires_grad_(False)
        weight[rows, columns], weight[rows + step[0], columns + step[1]] = 1.0, -1.0


def run(scale: Scale, seed: int) -> Evidence:
    """Bits a character and the heads' mean cosine: plain heads, both stages, the first alone."""
    full = scale == "full"
    kinds = ("MHA", "EIT", "no cross stage") + (("efficient",) if full else ())
    seeds, steps = range(seed, seed + (5 if full else 3)), 250 if full else 45
    batch, test = character_batches(12, 32 if not full else 48)
    bits: dict[str, list[float]] = {name: [] for name in kinds}
    agree: dict[str, list[float]] = {name: [] for name in kinds}
    for each in seeds:
        for name in kinds:
            torch.manual_seed(each)
            model = TinyTransformer([_layer(name) for _ in range(2)], 40, 40)
            train(model, batch, steps, each, 1e-2)
            bits[name].append(accuracy_and_bits(model, test)[1])
            agree[name].append(_agreement(model, test.inputs))
    saved = seed_interval((np.array(bits["MHA"]) - np.array(bits["EIT"])).tolist())
    closer = seed_interval((np.array(agree["EIT"]) - np.array(agree["MHA"])).tolist())
    both = min(saved.low, closer.low), min(saved.high, closer.high)
    return Evidence(
        measured={
            "smaller of both": min(saved.value, closer.value),
            "bits saved": saved.value,
            "rise of the heads' mean cosine": closer.value,
            **{f"bits, {name}": float(np.mean(bits[name])) for name in kinds if name != "MHA"},
        },
        baseline={"bits, MHA": float(np.mean(bits["MHA"])), "heads' mean cosine, MHA": float(np.mean(agree["MHA"]))},
        expected="heads that meet need fewer bits than plain heads, and agree more",
        interval=both,
        verdict=verdict_of(*both),
        decides="smaller of both",
        data="characters of AG News",
        model=f"2 layers of 4 heads, 32 features, {steps} steps, {len(seeds)} seeds",
        notes="Talking heads and the task of reversal are left out; all have rotary positions.",
        details={"bits": bits, "cosines": agree},
    )


@torch.no_grad()
def _agreement(model: TinyTransformer, inputs: torch.Tensor) -> float:
    """The mean cosine of two heads' weights, over layers."""
    found: list[float] = []

    def note(layer: Attention, given: tuple[torch.Tensor]) -> None:
        found.append(head_consensus(layer.attention_weights(given[0])))

    hooks = [layer.register_forward_pre_hook(note) for layer in model.layers]
    model(inputs)
    for hook in hooks:
        hook.remove()
    return float(np.mean(found))
