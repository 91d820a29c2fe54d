"""Mixture of attention heads against its definition and multi-query attention."""

from __future__ import annotations

import pytest
import torch

from polyhead.attention import AttentionShape, GroupedQueryAttention
from polyhead.attention.moa_heads import MixtureOfAttentionHeads
from polyhead.errors import InputError
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4)
CASES = {
    # gradients=False: which experts a token uses is a hard choice
    "moa-heads": Case(lambda causal: MixtureOfAttentionHeads(SHAPE, causal=causal, experts=6), gradients=False)
}


def test_output_and_losses_by_definition() -> None:
    layer = MixtureOfAttentionHeads(SHAPE, experts=6, balance=1.0, flat=0.5).double()
    hidden = torch.randn(1, 5, 32, dtype=torch.float64)
    out, logits = layer(hidden)[0], hidden[0] @ layer.route.weight.T
    k, v, p = layer.k_proj(hidden)[0], layer.v_proj(hidden)[0], logits.softmax(-1)
    used = torch.zeros(6, dtype=torch.float64)
    for t in range(5):
        best = p[t].argsort(descending=True)[:4]
        used[best] += 1 / 20
        wanted = torch.zeros(32, dtype=torch.float64)
        for i in best:
            q = layer.q_proj.weight[8 * i : 8 * i + 8] @ hidden[0, t]
            head = (k @ q / 8**0.5).softmax(0) @ v
            wanted += p[t, i] / p[t, best].sum() * (layer.o_proj.weight[:, 8 * i : 8 * i + 8] @ head)
        assert torch.allclose(out[t], wanted, atol=1e-9)
    loss = 6 * (used * p.mean(0)).sum() + 0.5 * logits.logsumexp(-1).square().mean()
    assert layer.balance_loss is not None
    assert torch.allclose(layer.balance_loss, loss)


def test_all_experts_at_equal_weights_is_multi_query_attention() -> None:
    layer, hidden = MixtureOfAttentionHeads(SHAPE, experts=4), torch.randn(1, 5, 32)
    torch.nn.init.zeros_(layer.route.weight)
    plain = GroupedQueryAttention(AttentionShape(32, 4, kv_heads=1))
    plain.load_state_dict({name: each for name, each in layer.state_dict().items() if "proj" in name})
    assert torch.allclose(4 * layer(hidden), plain(hidden), atol=1e-5)


def test_too_few_experts_are_refused() -> None:
    with pytest.raises(InputError, match="as many or more"):
        MixtureOfAttentionHeads(SHAPE, experts=3)
