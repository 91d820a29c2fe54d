"""Knocking heads against their definition, the identity at the start, and the folded layer."""

from __future__ import annotations

import pytest
import torch

import polyhead
from polyhead.attention import Attention, AttentionShape
from polyhead.attention.kha import KnockingHeadsAttention
from polyhead.errors import InputError
from polyhead.heads.weights import read_weights
from tests.attention.cases import Case
from tests.tiny import tiny

SHAPE = AttentionShape(32, 4, kv_heads=2, bias=True)


def moved(layer: KnockingHeadsAttention) -> KnockingHeadsAttention:
    with torch.no_grad():
        for knock in layer.maps.values():
            knock += 0.3 * torch.randn_like(knock)
    return layer


CASES = {
    "kha": Case(lambda causal: moved(KnockingHeadsAttention(SHAPE, causal=causal, parts="qkv"))),
    "kha-mlp": Case(lambda causal: moved(KnockingHeadsAttention(SHAPE, causal=causal, variant="mlp"))),
}


@pytest.mark.parametrize(("variant", "parts"), [("linear", "v"), ("linear", "qkv"), ("mlp", "v")])
def test_starts_as_the_trained_layer(variant: str, parts: str) -> None:
    trained, hidden = read_weights(polyhead.load(tiny("bert")), fold=False).layers[0], torch.randn(1, 5, 32)
    layer = KnockingHeadsAttention.from_mha(trained, variant=variant, parts=parts)
    assert torch.allclose(layer(hidden), Attention.from_mha(trained)(hidden), atol=1e-6)
    assert set(layer.mixing().values()) == {0.0}


@pytest.mark.parametrize("parts", ["v", "qk", "qkv"])
def test_folded_is_the_same_without_maps(parts: str) -> None:
    layer, hidden = moved(KnockingHeadsAttention(SHAPE, causal=True, parts=parts)), torch.randn(2, 6, 32)
    plain = layer.fold()
    assert type(plain) is Attention
    assert torch.allclose(plain(hidden), layer(hidden), atol=1e-5)
    assert not torch.allclose(plain(hidden), KnockingHeadsAttention(SHAPE, causal=True)(hidden), atol=1e-2)
    assert all(share > 0 for share in layer.mixing().values())
    assert layer.double().fold()(hidden.double()).dtype == torch.float64


def test_values_by_definition() -> None:
    layer, hidden = moved(KnockingHeadsAttention(SHAPE, variant="mlp")).double(), torch.randn(1, 3, 32).double()
    _, _, v = layer.project(hidden)
    for head in range(2):
        for t in range(3):
            plain = layer.v_proj(hidden)[0, t, 8 * head : 8 * head + 8]
            gate = 1 / (1 + torch.exp(-(plain @ layer.maps["gate"])))
            assert torch.allclose(v[0, head, t], 2 * (gate * (plain @ layer.maps["up"])) @ layer.maps["down"])
    linear = moved(KnockingHeadsAttention(SHAPE, parts="qk"))
    q, _, v = linear.project(hidden.float())
    assert torch.allclose(q[0, 3, 1], linear.q_proj(hidden.float())[0, 1, 24:] @ linear.maps["q"], atol=1e-6)
    assert torch.equal(v, linear.split(linear.v_proj(hidden.float())))


def test_what_does_not_fold_or_exist_is_refused() -> None:
    with pytest.raises(InputError, match="only 'linear' folds"):
        KnockingHeadsAttention(SHAPE, variant="mlp").fold()
    for variant, parts in (("mlp", "qv"), ("linear", "x"), ("linear", ""), ("conv", "v")):
        with pytest.raises(InputError, match="letters of 'qkv'"):
            KnockingHeadsAttention(SHAPE, variant=variant, parts=parts)  # type: ignore[arg-type]
