"""Fastmax against its dense polynomial, and the Taylor features against powers of inner products."""

from __future__ import annotations

import pytest
import torch

from polyhead.attention import AttentionShape
from polyhead.attention.fastmax import FastmaxAttention
from polyhead.attention.taylor import taylor_count, taylor_features
from polyhead.errors import InputError
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4, kv_heads=2)
CASES = {"fastmax": Case(lambda causal: FastmaxAttention(SHAPE, causal=causal))}


@pytest.mark.parametrize("order", [1, 2])
def test_features_multiply_to_the_polynomial(order: int) -> None:
    q, k = torch.randn(2, 50, 7, dtype=torch.float64)
    x = (q * k).sum(-1)
    wanted = 1 + x + (x**2 / 2 if order == 2 else 0)
    found = taylor_features(q, order) * taylor_features(k, order)
    assert found.shape[-1] == taylor_count(7, order)
    assert torch.allclose(found.sum(-1), wanted, atol=1e-12)
    with pytest.raises(InputError, match="expected 1 or 2"):
        taylor_features(q, 3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("order", [1, 2])
def test_factored_form_is_the_dense_one(causal: bool, order: int) -> None:
    torch.manual_seed(0)
    layer = FastmaxAttention(AttentionShape(32, 4), causal=causal, order=order).double()
    hidden = torch.randn(1, 9, 32, dtype=torch.float64)
    q, k, v = (layer.split(proj(hidden))[0] for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = ((each - each.mean(-1, keepdim=True)) / each.std(-1, correction=0, keepdim=True) for each in (q, k))
    x = q @ k.transpose(1, 2)
    dense = 1 + x + (x**2 / 2 if order == 2 else 0)
    dense = dense.tril() if causal else dense
    wanted = dense / dense.sum(-1, keepdim=True)
    assert torch.allclose(layer.attention_weights(hidden)[0], wanted, rtol=1e-2, atol=1e-3)
    layer_exact = FastmaxAttention(AttentionShape(32, 4), causal=causal, order=order, standardize=False).double()
    _, _, _, call = layer._prepared(hidden, None)
    assert torch.allclose(layer_exact.attend(q[None], k[None], v[None], call)[0], wanted @ v, atol=1e-8)
