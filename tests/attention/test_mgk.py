"""Mixtures of Gaussian keys against their definition and plain attention."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from polyhead.attention import AttentionShape
from polyhead.attention.mgk import GaussianKeysAttention, GaussianKeysLinearAttention
from polyhead.errors import InputError
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4, kv_heads=2)
CASES = {
    "mgk": Case(lambda causal: GaussianKeysAttention(SHAPE, causal=causal)),
    "mgk-shift": Case(lambda causal: GaussianKeysAttention(SHAPE, causal=causal, keys="shift", components=3)),
    # gradients=False: the best component is a hard choice
    "mgk-hard": Case(lambda causal: GaussianKeysAttention(SHAPE, causal=causal, estep="hard"), gradients=False),
    "mgk-linear": Case(lambda causal: GaussianKeysLinearAttention(SHAPE, causal=causal)),
}


@pytest.mark.parametrize("keys", ["project", "shift"])
@pytest.mark.parametrize("estep", ["soft", "hard"])
def test_weights_by_definition(keys: str, estep: str) -> None:
    layer = GaussianKeysAttention(SHAPE, keys=keys, estep=estep).double()  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.width)
    hidden = torch.randn(1, 5, 32, dtype=torch.float64)
    q = layer.q_proj(hidden)[0].unflatten(1, (4, 8))
    k = layer.k_proj(hidden)[0].unflatten(1, (2, 2, 8) if keys == "project" else (2, 1, 8))
    k = k if layer.shift is None else k + layer.shift[:, :, 0]
    pi = layer.share.softmax(1) if estep == "soft" else torch.ones(4, 2)
    weights = layer.attention_weights(hidden)
    for head in range(4):
        spread = 8**0.5 * layer.width[head].exp()
        far = (q[:, None, None, head] - k[None, :, head // 2]).square().sum(-1)
        mixture = pi[head] * torch.exp(-far / (2 * spread))
        mass = mixture.sum(-1) if estep == "soft" else mixture.amax(-1)
        assert torch.allclose(weights[0, head], mass / mass.sum(-1, keepdim=True), atol=1e-9)
        if estep == "soft":
            shares = (mixture / mixture.sum(-1, keepdim=True)).permute(2, 0, 1)
            assert torch.allclose(layer.responsibilities(hidden)[0, head], shares, atol=1e-9)


def test_one_component_of_unit_keys_is_plain_attention() -> None:
    layer = GaussianKeysAttention(SHAPE, components=1)
    q, k, _, call = layer._prepared(torch.randn(1, 6, 32), None)
    unit = F.normalize(k, dim=-1)
    plain = (q @ unit.repeat_interleave(2, 1).transpose(2, 3) / 8**0.5).softmax(-1)
    assert torch.allclose(layer.weights(q, unit, call), plain, atol=1e-6)


def test_linear_features_are_the_mixtures() -> None:
    layer, states = GaussianKeysLinearAttention(SHAPE), torch.randn(1, 4, 3, 8)
    torch.nn.init.normal_(layer.share)
    pi = layer.share.softmax(1)
    wanted = pi[1, 0] * (1 + F.elu(states[:, 2])) + pi[1, 1] * (1 + F.elu(states[:, 3]))
    assert torch.allclose(layer.features(states, "key")[:, 1], wanted)


def test_other_options_are_refused() -> None:
    with pytest.raises(InputError, match="'soft' or 'hard'"):
        GaussianKeysAttention(SHAPE, components=0)
