"""SeerAttention against its definition: gate, targets, chosen blocks, and gates of a model."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import polyhead
from polyhead.attention import AttentionShape
from polyhead.attention.seer import (
    SeerAttention,
    SeerGate,
    block_attention_targets,
    block_sparse_attention,
    gate_loss,
)
from polyhead.attention.seer_gates import ModelGates
from polyhead.errors import InputError
from tests.attention.cases import Case
from tests.tiny import tiny

SHAPE = AttentionShape(32, 4)
GROUPS = AttentionShape(32, 4, kv_heads=2, bias=True)
CASES = {
    # gradients=False: which blocks are looked at is a hard choice, and bfloat16 may choose others
    "seer-attention": Case(
        lambda causal: SeerAttention(GROUPS, causal=causal, block=3, keep=1), both=False, gradients=False
    ),
    # steps=False: the paper's form for prompts asks with all queries of a block, those still to come included
    "seer-attention-block": Case(
        lambda causal: SeerAttention(SHAPE, causal=causal, block=2, keep=2, choice="block"),
        both=False,
        gradients=False,
        steps=False,
    ),
}


def pooled_logits(gate: SeerGate, asked: torch.Tensor, keys: torch.Tensor, h: int, kv: int) -> torch.Tensor:
    """Logit of one averaged query against one block of keys ``[tokens, head_dim]``."""
    pool = torch.cat([keys.mean(0), keys.amax(0), keys.amin(0)])
    return (asked @ gate.query[h]) @ (pool @ gate.key[h]) / gate.query.shape[2] ** 0.5


@pytest.mark.parametrize("choice", ["token", "block"])
def test_weights_by_definition(choice: str) -> None:
    torch.manual_seed(0)
    layer = SeerAttention(GROUPS, block=3, keep=2, choice=choice).double().eval()  # type: ignore[arg-type]
    hidden = torch.randn(1, 17, 32, dtype=torch.float64)
    q, k, v = (layer.split(proj(hidden))[0] for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    wanted = torch.zeros(4, 17, 17, dtype=torch.float64)
    for h in range(4):
        for i in range(17):
            own = i // 3
            asked = q[h, 3 * own : i + 1 if choice == "token" else 3 * own + 3].mean(0)
            scores = [
                pooled_logits(layer.gate, asked, k[h // 2, 3 * c : 3 * c + 3], h, h // 2).item() for c in range(own)
            ]
            best = sorted(range(own), key=lambda c, s=scores: -s[c])[:2]
            seen = [j for j in range(i + 1) if j // 3 in (*best, own)]
            wanted[h, i, seen] = (k[h // 2, seen] @ q[h, i] / 8**0.5).softmax(0)
    assert torch.allclose(layer.attention_weights(hidden)[0], wanted, atol=1e-10)
    assert torch.allclose(layer.heads_of(hidden)[0], wanted @ v.repeat_interleave(2, 0), atol=1e-10)


def test_targets_and_loss_by_definition() -> None:
    torch.manual_seed(0)
    weights = torch.randn(1, 2, 7, 7, dtype=torch.float64).tril().softmax(-1).tril()
    found = block_attention_targets(weights, 3)
    most = torch.stack(
        [
            torch.stack([weights[0, :, 3 * r : 3 * r + 3, 3 * c : 3 * c + 3].amax((1, 2)) for c in range(3)], -1)
            for r in range(3)
        ],
        1,
    )
    assert torch.allclose(found[0], most / most.sum(-1, keepdim=True))
    logits = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    rows = [
        F.kl_div(logits[0, h, r, : r + 1].log_softmax(0), found[0, h, r, : r + 1], reduction="sum")
        for h in range(2)
        for r in range(3)
    ]
    assert torch.allclose(gate_loss(logits, found), torch.stack(rows).mean())


def test_blocks_gathered_are_those_masked() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 14, 8, dtype=torch.float64) for _ in range(3))
    chosen = torch.stack([torch.stack([torch.randperm(4)[:2] for _ in range(12)]).view(3, 4, 2) for _ in range(2)])
    opened = torch.zeros(2, 3, 4, 4).scatter(3, chosen, 1.0).bool() | torch.eye(4).bool()
    met = opened.repeat_interleave(4, 2).repeat_interleave(4, 3)[:, :, :14, :14].tril()
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=met, scale=1.0)
    assert torch.allclose(block_sparse_attention(q, k, v, chosen, 4), wanted, atol=1e-10)


def test_training_is_dense_and_teaches_the_gate_alone() -> None:
    torch.manual_seed(0)
    layer, hidden = SeerAttention(SHAPE, block=4, keep=1).double(), torch.randn(2, 13, 32, dtype=torch.float64)
    padding = torch.arange(13)[None] >= torch.tensor([[0], [4]])
    dense = F.scaled_dot_product_attention(
        *(layer.split(proj(hidden)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj)), is_causal=True
    )
    assert torch.allclose(layer.heads_of(hidden), dense, atol=1e-10)
    layer(hidden[1:, 4:])
    alone = layer.balance_loss
    layer(hidden[:1])
    first = layer.balance_loss
    layer(hidden, padding)
    rows = torch.tensor([4, 3])  # blocks of each text
    assert torch.allclose(layer.balance_loss, (first * rows[0] + alone * rows[1]) / rows.sum())
    layer.balance_loss.backward()
    assert layer.q_proj.weight.grad is None
    assert layer.gate.query.grad.abs().sum() > 0
    layer.eval()(hidden)
    assert layer.balance_loss is None


def test_gates_of_a_model_learn_and_choose() -> None:
    torch.manual_seed(0)
    model = polyhead.load(tiny("llama"))
    rows = [torch.randint(3, 99, (16,)).tolist() for _ in range(3)]
    ids = torch.tensor(rows[:1])
    gates = ModelGates(block=4, keep=1, steps=15).fit(model, rows)
    assert gates.losses_[-1] < gates.losses_[0]
    with torch.no_grad():
        plain = model(input_ids=ids).last_hidden_state
        with gates.on(model):
            few = model(input_ids=ids).last_hidden_state
        gates.keep = 4
        with gates.on(model):
            assert torch.allclose(model(input_ids=ids).last_hidden_state, plain, atol=1e-6)
            with pytest.raises(InputError, match="whole texts"):
                model(input_ids=ids, attention_mask=(torch.arange(16) < 9).long()[None])
    assert torch.allclose(few[:, :8], plain[:, :8], atol=1e-6)
    assert not torch.allclose(few[:, 12:], plain[:, 12:], atol=1e-5)


def test_bad_knobs_are_refused() -> None:
    for knobs in ({"block": 0}, {"keep": 0}, {"choice": "head"}):
        with pytest.raises(InputError, match="expected"):
            SeerAttention(SHAPE, **knobs)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="choice='token'"):
        SeerAttention(SHAPE, choice="block").step(torch.randn(1, 2, 32))
    with pytest.raises(InputError, match="fit"), ModelGates().on(polyhead.load(tiny("llama"))):
        pass
    with pytest.raises(InputError, match="no texts"):
        ModelGates().fit(polyhead.load(tiny("llama")), [])
    with pytest.raises(InputError, match="at least 1"):
        ModelGates(keep=0)
