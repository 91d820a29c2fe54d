"""Cross-attention: the layers that look back, their weights as the model gives them, and planted concept heads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from transformers import BartConfig, BartModel, T5Config, T5Model

from polyhead.act.rescale import RescaleAttention
from polyhead.errors import InputError
from polyhead.heads.cross_attention import cross_attention, ordered_weakening
from polyhead.heads.span_heads import ConceptHeads, ConceptSample

INPUTS = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]]), "decoder_input_ids": torch.tensor([[3, 4, 5]])}


def _whole(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "bart":
        shape = {
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 37,
            "decoder_ffn_dim": 37,
        }
        config = BartConfig(
            vocab_size=50,
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            max_position_embeddings=32,
            init_std=0.3,
            **shape,
        )
        return BartModel(config).eval()
    if kind == "t5":
        return T5Model(T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)).eval()
    return tiny("whisper", decoder_layers=2)


@pytest.mark.parametrize(
    ("kind", "paths"),
    [
        ("bart", ["decoder.layers.0.encoder_attn", "decoder.layers.1.encoder_attn"]),
        ("t5", ["decoder.block.0.layer.1.EncDecAttention", "decoder.block.1.layer.1.EncDecAttention"]),
        ("whisper", ["decoder.layers.0.encoder_attn", "decoder.layers.1.encoder_attn"]),
    ],
)
def test_the_layers_are_those_that_look_back(kind: str, paths: list[str]) -> None:
    model = cross_attention(_whole(kind))
    assert [layer.path for layer in model.attention_layers] == paths
    assert (model.layers, model.heads, model.head_dim) == (2, 4, 8)


@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_points_follow_the_models_own_cross_attention(kind: str) -> None:
    module = _whole(kind)
    module.set_attn_implementation("eager")
    with torch.no_grad():
        weights = module(**INPUTS, output_attentions=True).cross_attentions
    module.set_attn_implementation("sdpa")
    sample = ConceptSample(INPUTS, [1, 2], {"cat": [1, 2], "dog": [4]})
    found = ConceptHeads().measure(cross_attention(module), [sample])
    for layer, weight in enumerate(weights):
        rows = weight[0, :, [1, 2]].double().mean(1)  # [heads, keys]
        expected = (rows[:, [1, 2]].mean(1) > rows[:, 4]).double().numpy()
        np.testing.assert_array_equal(found["cat"].values[layer], expected)
        np.testing.assert_array_equal(found["dog"].values[layer], 1 - expected)


def test_weakening_in_order_multiplies_the_attention_on_the_span() -> None:
    model = cross_attention(_whole("bart"))

    def concept() -> float:
        with torch.no_grad():
            return float(model(**INPUTS).last_hidden_state.square()[0, :, :3].sum())

    order = [(1, 2), (0, 3)]
    curve = ordered_weakening(model, order, (1, 3), concept)
    factors = np.ones((2, 4))
    expected = [concept()]
    for layer, head in order:
        factors[layer, head] = -2
        with RescaleAttention((1, 3), factors).on(model):
            expected.append(concept())
    np.testing.assert_allclose(curve, expected)
    assert len(set(expected)) == 3
    assert concept() == expected[0]


def test_models_and_places_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="no cross-attention"):
        cross_attention(tiny("bert"))
    model = cross_attention(_whole("bart"))
    with pytest.raises(InputError, match="of an input of 3 tokens"):
        ConceptHeads().measure(model, [ConceptSample(INPUTS, [4], {"cat": [1], "dog": [2]})])
    with pytest.raises(InputError, match="of an input of 5 tokens"):
        ConceptHeads().measure(model, [ConceptSample(INPUTS, [0], {"cat": [1], "dog": [5]})])
