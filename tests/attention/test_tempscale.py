"""TempScale against its definition, the action of the same name, and what heads let through."""

from __future__ import annotations

import pytest
import torch

import polyhead
from polyhead.act import Temperature, length_report
from polyhead.attention import AttentionShape, register
from polyhead.attention.tempscale import TempScaleAttention, high_frequency_gain
from polyhead.errors import InputError
from polyhead.heads.weights import read_weights
from tests.attention.cases import Case
from tests.tiny import inputs_for, tiny

SHAPE = AttentionShape(32, 4, kv_heads=2)
CASES = {"tempscale": Case(lambda causal: TempScaleAttention(SHAPE, causal=causal, tau=0.7))}


def test_weights_by_definition() -> None:
    layer, hidden = TempScaleAttention(SHAPE, tau=0.25).double(), torch.randn(1, 5, 32, dtype=torch.float64)
    q, k, v = layer.project(hidden)
    found, heads = layer.attention_weights(hidden), layer.heads_of(hidden)
    for head in range(4):
        wanted = ((q[0, head] @ k[0, head // 2].T) / (0.25 * 8**0.5)).softmax(-1)
        assert torch.allclose(found[0, head], wanted)
        assert torch.allclose(heads[0, head], wanted @ v[0, head // 2])


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_registered_is_the_action(family: str) -> None:
    model, inputs = polyhead.load(tiny(family)), inputs_for(family)
    with torch.no_grad():
        with Temperature(0.2).on(model):
            wanted = model(**inputs).last_hidden_state
        plain = model(**inputs).last_hidden_state
        model.module.set_attn_implementation(register(TempScaleAttention(None, tau=0.2)))
        found = model.module(**inputs).last_hidden_state
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-4)


def test_starts_from_a_trained_layer_and_refuses_cold() -> None:
    trained = read_weights(polyhead.load(tiny("bert")), fold=False).layers[0]
    layer = TempScaleAttention.from_mha(trained, tau=0.5)
    assert layer.scale(torch.zeros(1, 1, 1, 16), layer._prepared(torch.zeros(1, 2, 32), None)[3]) == 0.5
    for tau in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="above 0"):
            TempScaleAttention(None, tau=tau)


def test_gain_is_the_largest_singular_value() -> None:
    weights = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0)).double().mul(3).softmax(-1)
    centred = (torch.eye(20).double() - 1 / 20) @ weights
    wanted = torch.linalg.svdvals(centred)[..., 0]
    assert torch.allclose(high_frequency_gain(weights, 400), wanted, rtol=1e-6)
    assert torch.allclose(high_frequency_gain(weights), wanted, rtol=0.02)
    with pytest.raises(InputError, match="tokens, tokens"):
        high_frequency_gain(torch.ones(2, 3))


@pytest.mark.real_model
def test_report_is_cosine_distance_and_gain(minilm_path: str) -> None:
    model = polyhead.load(minilm_path)
    texts = ["a ship left the harbour at dawn", "tax law is dull but pays well", "one two three four five six"]
    (row,) = length_report(model, texts, (5,), batch_size=2)
    pooled, gains = [], []
    for text in texts:
        with torch.no_grad(), model.record("attention") as recording:
            states = model(**model.tokenize([text], truncation=True, max_length=5)).last_hidden_state
        pooled.append(torch.nn.functional.normalize(states[0].mean(0).double(), dim=0))
        centred = (torch.eye(5) - 1 / 5) @ recording.attention[0]
        gains.append(torch.linalg.svdvals(centred)[..., 0])
    pairs = [float(pooled[i] @ pooled[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    centre = sum(pooled) / 3
    assert row.cosine == pytest.approx(sum(pairs) / 3, abs=1e-6)
    assert row.distance == pytest.approx(sum(float((one - centre).norm()) for one in pooled) / 3, abs=1e-6)
    assert torch.allclose(torch.from_numpy(row.gain.values), torch.stack(gains).mean(0).double(), rtol=0.01)
