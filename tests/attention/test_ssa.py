"""Temperatures of queries and values against their definition."""

from __future__ import annotations

import math

import torch

import polyhead
from polyhead.attention import Attention, AttentionShape
from polyhead.attention.ssa import SelectiveSelfAttention, TokenTemperature
from polyhead.heads.weights import read_weights
from tests.attention.cases import Case
from tests.tiny import tiny

SHAPE = AttentionShape(32, 4, kv_heads=2)


def moved(layer: SelectiveSelfAttention) -> SelectiveSelfAttention:
    for term in (layer.token, layer.value):
        if term is not None:
            torch.nn.init.normal_(term.out.weight)
    if layer.growth is not None:
        torch.nn.init.constant_(layer.growth, 0.4)
    return layer


CASES = {
    "ssa": Case(lambda causal: moved(SelectiveSelfAttention(SHAPE, causal=causal))),
    "ssa-position": Case(lambda causal: moved(SelectiveSelfAttention(SHAPE, causal=causal, token=False, value=False))),
    "ssa-token": Case(lambda causal: moved(SelectiveSelfAttention(SHAPE, causal=causal, position=False))),
}


def test_weights_and_values_by_definition() -> None:
    for causal in (True, False):
        layer = moved(SelectiveSelfAttention(SHAPE, causal=causal)).double()
        hidden = torch.randn(1, 6, 32, dtype=torch.float64)
        q, k = layer.split(layer.q_proj(hidden)), layer.split(layer.k_proj(hidden))
        weights, (_, _, v) = layer.attention_weights(hidden), layer.project(hidden)
        for t in range(6):
            seen = t + 1 if causal else 6
            f = torch.nn.functional.gelu(layer.token.down(hidden[0, t]))
            tau = 1 + math.log(seen) / (1 + math.exp(-layer.growth.item())) + torch.tanh(layer.token.out(f))
            for head in range(4):
                row = (tau * (k[0, head // 2, :seen] @ q[0, head, t]) / 8**0.5).softmax(0)
                assert torch.allclose(weights[0, head, t, :seen], row, atol=1e-9)
            g = layer.value.out(torch.nn.functional.gelu(layer.value.down(hidden[0, t])))
            plain = layer.v_proj(hidden)[0, t].unflatten(0, (2, 8))
            assert torch.allclose(v[0, :, t], plain * (1 + torch.tanh(g)))


def test_without_the_position_term_it_starts_as_the_trained_layer() -> None:
    trained, hidden = read_weights(polyhead.load(tiny("bert")), fold=False).layers[0], torch.randn(1, 5, 32)
    layer = SelectiveSelfAttention.from_mha(trained, position=False)
    assert torch.allclose(layer(hidden), Attention.from_mha(trained)(hidden), atol=1e-6)


def test_one_temperature_serves_all_layers() -> None:
    shared = TokenTemperature(32, width=3)
    layers = [SelectiveSelfAttention(SHAPE, token=shared, value=shared) for _ in range(2)]
    model = torch.nn.Sequential(*layers)
    own = sum(each.numel() for each in model.parameters()) - 2 * sum(p.numel() for p in Attention(SHAPE).parameters())
    assert own == 2 + (32 * 3 + 3) + (3 + 1)


def test_longer_texts_are_read_sharper() -> None:
    layer = SelectiveSelfAttention(SHAPE, token=False, value=False)
    torch.nn.init.constant_(layer.growth, 0.0)
    layer.k_proj.weight.data.mul_(2)
    plain = Attention(SHAPE)
    plain.load_state_dict({name: each for name, each in layer.state_dict().items() if "proj" in name})
    hidden = torch.randn(1, 200, 32)
    own, theirs = (one.attention_weights(hidden).amax(-1).mean() for one in (layer, plain))
    assert own > 2 * theirs
