"""Normalised linear attention and block-diagonal softmax against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from polyhead.attention import AttentionShape, LinearAttention
from polyhead.attention.transnormer import BlockDiagonalAttention, NormAttention, transnormer_layers
from polyhead.errors import InputError
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4)
GROUPS = AttentionShape(32, 4, kv_heads=2, bias=True)
CASES = {
    "transnormer": Case(lambda causal: NormAttention(GROUPS, causal=causal)),
    "transnormer-diag": Case(lambda causal: BlockDiagonalAttention(GROUPS, causal=causal, block=4)),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_norm_attention_by_definition(causal: bool, relu: bool) -> None:
    torch.manual_seed(0)
    layer = NormAttention(SHAPE, causal=causal, relu=relu).double()
    torch.nn.init.uniform_(layer.gain)
    hidden = torch.randn(1, 9, 32, dtype=torch.float64)
    q, k, v = layer.q_proj(hidden)[0], layer.k_proj(hidden)[0], layer.v_proj(hidden)[0]
    q, k = (F.relu(each) if relu else torch.where(each > 0, each + 1, each.exp()) for each in (q, k))
    out = []
    for i in range(9):
        seen = i + 1 if causal else 9
        parts = [q[i, h : h + 8] @ (k[:seen, h : h + 8].T @ v[:seen, h : h + 8]) for h in range(0, 32, 8)]
        mixed = torch.cat(parts)
        out.append(layer.o_proj(mixed / (mixed.square().mean() + 1e-6).sqrt() * layer.gain.flatten()))
    assert torch.allclose(layer(hidden)[0], torch.stack(out), atol=1e-10)


def test_norm_keeps_gradients_small_where_the_sum_of_weights_is_small() -> None:
    torch.manual_seed(0)
    pull = {}
    for kind in (LinearAttention, NormAttention):
        layer = kind(AttentionShape(8, 1), causal=True).double()
        q = torch.full((1, 1, 6, 8), -12.0, dtype=torch.float64, requires_grad=True)
        k = torch.randn(1, 1, 6, 8, dtype=torch.float64) - 12
        k.requires_grad_()
        v = torch.randn(1, 1, 6, 8, dtype=torch.float64)
        _, _, _, call = layer._prepared(torch.zeros(1, 6, 8, dtype=torch.float64), None)
        (slope,) = torch.autograd.grad(layer.attend(q, k, v, call)[..., 0].sum(), k)
        pull[kind] = slope.abs().max().item()
    assert pull[NormAttention] < 1e-3 * pull[LinearAttention]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [3, 8, 11])
def test_blocks_by_definition(causal: bool, tokens: int) -> None:
    torch.manual_seed(0)
    layer = BlockDiagonalAttention(SHAPE, causal=causal, block=4).double()
    hidden = torch.randn(1, tokens, 32, dtype=torch.float64)
    q, k, v = (layer.split(proj(hidden))[0] for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    wanted = torch.zeros_like(q)
    for i in range(tokens):
        first = i - i % 4
        last = i + 1 if causal else min(first + 4, tokens)
        for h in range(4):
            e = (k[h, first:last] @ q[h, i] / 8**0.5).exp()
            wanted[h, i] = (e / e.sum()) @ v[h, first:last]
    assert torch.allclose(layer.heads_of(hidden)[0], wanted, atol=1e-10)
    assert torch.allclose(layer.attention_weights(hidden)[0] @ v, wanted, atol=1e-10)


def test_a_block_is_forgotten_at_its_end() -> None:
    layer = BlockDiagonalAttention(SHAPE, causal=True, block=4)
    assert [layer.cache_bytes(tokens) // layer.cache_bytes(1) for tokens in (1, 3, 4, 9)] == [1, 3, 0, 1]
    with pytest.raises(InputError, match="at least 1"):
        BlockDiagonalAttention(SHAPE, block=0)


def test_layers_of_a_stack() -> None:
    kinds = [type(layer) for layer in transnormer_layers(SHAPE, 5, causal=True)]
    assert kinds == [BlockDiagonalAttention] * 2 + [NormAttention] * 3
