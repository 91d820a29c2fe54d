"""Selective self-attention: do temperatures learn to be sharp where one token counts and flat where many do?"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.ssa import SelectiveSelfAttention
from polyhead.claims._tiny_tasks import Batch, TinyTransformer, accuracy_and_bits, seed_interval, train
from polyhead.claims.base import Evidence, Scale, verdict_of

_NAMES, _VALUES, _PAIRS = 32, 8, 16
_KINDS = ("standard", "position", "token", "full")


def copy_or_average(generator: torch.Generator, count: int) -> Batch:
    """16 tokens of a name and a value; then 8 names, whose values are asked, and 8 marks that ask for the commonest."""
    keys = torch.rand(count, _NAMES, generator=generator).argsort(1)[:, :_PAIRS]
    held = torch.randint(_VALUES, (count, _PAIRS), generator=generator)
    common = torch.randint(_VALUES, (count, 1), generator=generator)
    held = torch.where(torch.rand(count, _PAIRS, generator=generator) < 0.3, common, held)
    counts = F.one_hot(held, _VALUES).sum(1)
    order = torch.rand(count, _PAIRS, generator=generator).argsort(1)[:, : _PAIRS // 2]
    inputs = torch.zeros(count, 2 * _PAIRS, _NAMES + _VALUES + 1)
    inputs[:, :_PAIRS, :_NAMES] = F.one_hot(keys, _NAMES).float()
    inputs[:, :_PAIRS, _NAMES:-1] = F.one_hot(held, _VALUES).float()
    inputs[:, _PAIRS::2, :_NAMES] = F.one_hot(keys.gather(1, order), _NAMES).float()
    inputs[:, _PAIRS + 1 :: 2, -1] = 1
    labels = torch.full((count, 2 * _PAIRS), -1)
    labels[:, _PAIRS::2] = held.gather(1, order)
    labels[:, _PAIRS + 1 :: 2] = counts.argmax(1, keepdim=True)
    return Batch(inputs, labels)


def _layer(name: str) -> Attention:
    shape = AttentionShape(32, 4)
    if name == "standard":
        return Attention(shape, causal=True)
    token, position = name != "position", name != "token"
    return SelectiveSelfAttention(shape, causal=True, token=token, position=position, value=name == "full")


def run(scale: Scale, seed: int) -> Evidence:
    """Bits an answer of plain attention and of temperatures by place, by token, and both with values."""
    full = scale == "full"
    seeds, steps, deep = range(seed, seed + (6 if full else 3)), 500 if full else 120, 2 if full else 1
    bits: dict[str, list[float]] = {name: [] for name in _KINDS}
    sharper: list[float] = []
    for each in seeds:
        test = copy_or_average(torch.Generator().manual_seed(10_000 + each), 256)
        for name in _KINDS:
            torch.manual_seed(each)
            layers = [_layer(name) for _ in range(deep)]
            model = TinyTransformer(layers, _NAMES + _VALUES + 1, _VALUES)
            train(model, lambda generator: copy_or_average(generator, 32), steps, each, 5e-3)
            bits[name].append(accuracy_and_bits(model, test)[1])
            if name == "full":
                sharper.append(_contrast(model, test))
    saved = seed_interval((np.array(bits["standard"]) - np.array(bits["full"])).tolist())
    apart = seed_interval(sharper)
    both = min(saved.low, apart.low), min(saved.high, apart.high)
    return Evidence(
        measured={
            "smaller of both": min(saved.value, apart.value),
            "bits saved, full": saved.value,
            "temperature factor, copying less averaging": apart.value,
            **{f"bits, {name}": float(np.mean(bits[name])) for name in _KINDS if name != "standard"},
        },
        baseline={"bits, standard": float(np.mean(bits["standard"]))},
        expected="all terms together save bits, and queries that copy have sharper logits than those that average",
        interval=both,
        verdict=verdict_of(*both),
        decides="smaller of both",
        data="16 names with values, then names to look up between marks that ask for the commonest value",
        model=f"{deep} layer(s) of 4 heads, 32 features, {steps} steps, {len(seeds)} seeds",
        notes="The factor is 1 + place + token term of the last layer. Language modelling is left out for time.",
        details={"bits": bits, "factor, copying less averaging": sharper},
    )


@torch.no_grad()
def _contrast(model: TinyTransformer, test: Batch) -> float:
    """How much larger the token term of the last layer is where a value is copied than where values are averaged."""
    given: list[torch.Tensor] = []
    layer = model.layers[-1]
    assert isinstance(layer, SelectiveSelfAttention)
    assert layer.token is not None
    hook = layer.register_forward_pre_hook(lambda _, states: given.append(states[0]))
    model(test.inputs)
    hook.remove()
    token = layer.token(given[0])[:, 0, :, 0]
    return (token[:, _PAIRS::2].mean() - token[:, _PAIRS + 1 :: 2].mean()).item()
