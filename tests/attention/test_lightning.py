"""Lightning attention against its recurrence and its masked quadratic form."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from polyhead.attention import AttentionShape
from polyhead.attention.lightning import LightningAttention, head_decays
from polyhead.errors import InputError
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4)
CASES = {
    "lightning-attention": Case(lambda causal: LightningAttention(SHAPE, causal=causal), both=False),
    "lightning-attention-plain": Case(
        lambda causal: LightningAttention(SHAPE, causal=causal, rates=(1.0, 0.9, 0.5, 0.1), gate=False, block=4),
        both=False,
    ),
}


def token_by_token(layer: LightningAttention, hidden: torch.Tensor) -> torch.Tensor:
    """The recurrence ``KV <- decay KV + k^T v`` with its norm and gate."""
    q, k = F.silu(layer.q_proj(hidden)), F.silu(layer.k_proj(hidden))
    v, out = layer.v_proj(hidden), []
    state = torch.zeros(4, 8, 8, dtype=hidden.dtype)
    for t in range(hidden.shape[0]):
        parts = []
        for h in range(4):
            own = slice(8 * h, 8 * h + 8)
            state[h] = layer.rates[h] * state[h].clone() + torch.outer(k[t, own], v[t, own])
            parts.append(q[t, own] @ state[h])
        mixed = torch.cat(parts)
        mixed = mixed / (mixed.square().mean() + 1e-6).sqrt()
        out.append(layer.o_proj(mixed * layer.u_proj(hidden[t])) if layer.u_proj else layer.o_proj(mixed))
    return torch.stack(out)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("block", [1, 5, 64])
def test_blocks_are_the_recurrence(gate: bool, block: int) -> None:
    torch.manual_seed(0)
    layer = LightningAttention(SHAPE, rates=(1.0, 0.9, 0.5, 0.1), gate=gate, block=block).double()
    hidden = torch.randn(1, 13, 32, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(layer(hidden)[0], token_by_token(layer, hidden[0]), atol=1e-10)


def test_gradients_of_blocks_are_those_of_the_quadratic_form() -> None:
    torch.manual_seed(0)
    layer = LightningAttention(SHAPE, rates=(1.0, 0.9, 0.5, 0.1), block=4).double()
    hidden = torch.randn(1, 11, 32, dtype=torch.float64, requires_grad=True)
    v = layer.split(layer.v_proj(hidden))
    heads = layer.finish(layer.attention_weights(hidden) @ v)
    dense = layer.o_proj(heads.transpose(1, 2).flatten(2) * layer.u_proj(hidden))
    (wanted,) = torch.autograd.grad(dense.square().sum(), hidden, retain_graph=True)
    (found,) = torch.autograd.grad(layer(hidden).square().sum(), hidden)
    assert torch.allclose(found, wanted, atol=1e-8)


def test_decays_of_heads_and_layers() -> None:
    assert head_decays(8)[0] == 1
    assert head_decays(8)[4] == pytest.approx(torch.tensor(-4.0).exp().item())
    assert head_decays(8, depth=0.5)[4] == pytest.approx(torch.tensor(-2.0).exp().item())
    with pytest.raises(InputError, match="from 0 to 1"):
        head_decays(8, depth=2)
    with pytest.raises(InputError, match="expected 4 numbers"):
        LightningAttention(SHAPE, rates=(0.5, 1.5, 1, 1))
