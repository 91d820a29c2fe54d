"""Mixture of attention heads against its definition and multi-query attention."""

from __future__ import annotations

import math

import pytest
import torch

from polyhead.attention import AttentionShape, GroupedQueryAttention
from polyhead.attention.moa_heads import MixtureOfAttentionHeads, expert_use, token_expert_pmi
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


def test_use_and_pmi_are_counts() -> None:
    torch.manual_seed(0)
    layer, hidden = MixtureOfAttentionHeads(AttentionShape(32, 2), experts=5), torch.randn(2, 6, 32)
    ids, real = torch.randint(3, (2, 6)) * 10, torch.ones(2, 6, dtype=torch.bool)
    real[1, :2] = False
    best = layer.router(hidden).topk(2, -1).indices
    chosen = [(int(ids[b, t]), int(e)) for b in range(2) for t in range(6) if real[b, t] for e in best[b, t]]
    use = expert_use(layer, hidden, real)
    assert use.tolist() == pytest.approx([sum(e == at for _, e in chosen) / 20 for at in range(5)])
    kinds, pmi = token_expert_pmi(layer, hidden, ids, real)
    assert kinds.tolist() == sorted({kind for kind, _ in chosen})
    for row, kind in enumerate(kinds.tolist()):
        for expert in range(5):
            both = chosen.count((kind, expert)) / 20
            of_kind, of_expert = (sum(pair[i] == x for pair in chosen) / 20 for i, x in ((0, kind), (1, expert)))
            wanted = math.log2(both / (of_kind * of_expert)) if both else (-math.inf if of_expert else 0.0)
            assert pmi[row, expert].item() == pytest.approx(wanted)
    with pytest.raises(InputError, match="one a token"):
        token_expert_pmi(layer, hidden, ids[:1])
