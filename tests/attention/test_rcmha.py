"""Relative convolutional attention against its definition, and its switches against the forms it contains."""

from __future__ import annotations

import pytest
import torch

import polyhead
from polyhead.attention import Attention, AttentionShape
from polyhead.attention.rcmha import RelativeConvAttention
from polyhead.errors import InputError
from polyhead.heads.weights import read_weights
from tests.attention.cases import Case
from tests.tiny import tiny

SHAPE = AttentionShape(32, 4, kv_heads=2, bias=True)


def moved(causal: bool, **knobs: int | bool) -> RelativeConvAttention:
    layer = RelativeConvAttention(SHAPE, causal=causal, max_distance=3, **knobs)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if "proj" not in name:
                weight += 0.5 * torch.randn_like(weight)
    return layer


CASES = {
    "rcmha": Case(lambda causal: moved(causal)),
    "rcmha-conv-4": Case(lambda causal: moved(causal, kernel=4, relative=False)),
}


@pytest.mark.parametrize("causal", [True, False])
def test_by_definition(causal: bool) -> None:
    torch.manual_seed(0)
    layer, hidden = moved(causal).double(), torch.randn(1, 7, 32, dtype=torch.float64)
    states = {}
    for part in "qkv":
        linear, filters = getattr(layer, f"{part}_proj"), layer.filters[part]
        raw, found = hidden[0] @ linear.weight.T, torch.zeros(7, len(linear.weight), dtype=torch.float64)
        for t in range(7):
            for tap in range(3):
                at = t - 2 + tap if causal else t - 1 + tap
                found[t] += filters[:, tap] * raw[at] if 0 <= at < 7 else 0
        states[part] = found + linear.bias
    weights = layer.attention_weights(hidden)
    for head in range(4):
        q = states["q"][:, 8 * head : 8 * head + 8]
        k = states["k"][:, 8 * (head // 2) : 8 * (head // 2) + 8]
        logits = torch.full((7, 7), -torch.inf, dtype=torch.float64)
        for i in range(7):
            for j in range(i + 1 if causal else 7):
                apart = max(-3, min(3, i - j))
                r = layer.distances[head, apart if causal else apart + 3]
                content = (q[i] + layer.of_content[head, 0]) @ k[j]
                logits[i, j] = (content + (q[i] + layer.of_distance[head, 0]) @ r) / 8**0.5
        assert torch.allclose(weights[0, head], logits.softmax(-1))
        values = states["v"][:, 8 * (head // 2) : 8 * (head // 2) + 8]
        assert torch.allclose(layer.heads_of(hidden)[0, head], logits.softmax(-1) @ values)


def test_starts_as_the_trained_layer_and_switches_off() -> None:
    trained, hidden = read_weights(polyhead.load(tiny("bert")), fold=False).layers[0], torch.randn(1, 5, 32)
    wanted = Attention.from_mha(trained)(hidden)
    for conv, relative in ((True, True), (True, False), (False, True), (False, False)):
        layer = RelativeConvAttention.from_mha(trained, conv=conv, relative=relative)
        assert torch.allclose(layer(hidden), wanted, atol=1e-6)
        names = {name.split(".")[0] for name, _ in layer.named_parameters()}
        assert ("filters" in names) == conv
        assert ("distances" in names) == relative


def test_wrong_counts_are_refused() -> None:
    for knobs in ({"kernel": 0}, {"max_distance": 0}):
        with pytest.raises(InputError, match="from 1"):
            RelativeConvAttention(SHAPE, **knobs)
