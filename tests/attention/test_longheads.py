"""LongHeads against its definition."""

from __future__ import annotations

import pytest
import torch

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.longheads import LongHeadsAttention
from polyhead.errors import InputError
from polyhead.positions import RotaryPositions
from polyhead.positions.rotary import rotate
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4)
GROUPS = AttentionShape(32, 4, kv_heads=2, bias=True)
CASES = {
    # gradients=False: which chunks are read is a hard choice, and bfloat16 may choose others
    "longheads": Case(
        lambda causal: LongHeadsAttention(GROUPS, causal=causal, positions=RotaryPositions(8), chunk=2, budget=6),
        both=False,
        gradients=False,
    ),
    "longheads-no-positions": Case(
        lambda causal: LongHeadsAttention(SHAPE, causal=causal, chunk=2, budget=8, per_head=False),
        both=False,
        gradients=False,
    ),
}


def turned(states: torch.Tensor, places: list[int]) -> torch.Tensor:
    angles = torch.tensor(places, dtype=torch.float64)[:, None] * RotaryPositions(8).frequencies(states.device)
    return rotate(states[None, None], angles[None, None])[0, 0]


@pytest.mark.parametrize("per_head", [True, False])
def test_heads_by_definition(per_head: bool) -> None:
    torch.manual_seed(0)
    layer = LongHeadsAttention(SHAPE, positions=RotaryPositions(8), chunk=3, budget=12, per_head=per_head).double()
    hidden = torch.randn(1, 23, 32, dtype=torch.float64)
    q, k, v = (layer.split(proj(hidden))[0].detach() for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    keys = torch.zeros(4, 7, 8, dtype=torch.float64)
    for h in range(4):
        for c in range(7):
            part = slice(3 * c, 3 * c + 3)
            a, b = turned(q[h, part], [0, 1, 2]), turned(k[h, part], [0, 1, 2])
            said = ((a @ b.T / 8**0.5).softmax(1) @ v[h, part]).mean(0)
            keys[h, c] = (b @ said / 8**0.5).softmax(0) @ b
    wanted, chosen = torch.zeros_like(q), layer.chosen(hidden)[0]
    for i in range(23):
        own = i // 3
        scores = torch.einsum("hd,hcd->hc", q[:, i], keys)
        scores = scores if per_head else scores.sum(0).expand(4, -1)
        for h in range(4):
            read = sorted({0, max(own - 1, 0), own})
            rest = sorted((c for c in range(own) if c not in read), key=lambda c, s=scores[h]: -s[c].item())
            read = sorted(read + rest[: 4 - len(read)])
            assert chosen[h, i].nonzero()[:, 0].tolist() == read
            seen = [j for c in read for j in range(3 * c, 3 * c + 3) if j <= i]
            there = turned(k[h, seen], list(range(len(seen))))  # close ranks
            wanted[h, i] = (there @ turned(q[h, i : i + 1], [len(seen) - 1])[0] / 8**0.5).softmax(0) @ v[h, seen]
    assert torch.allclose(layer.heads_of(hidden)[0], wanted, atol=1e-10)
    assert torch.allclose(layer.attention_weights(hidden)[0] @ v, wanted, atol=1e-10)


@pytest.mark.parametrize("rotary", [True, False])
def test_within_the_budget_it_is_plain_attention(rotary: bool) -> None:
    torch.manual_seed(0)
    positions = RotaryPositions(8) if rotary else None
    layer, hidden = LongHeadsAttention(GROUPS, positions=positions, chunk=4, budget=12), torch.randn(2, 12, 32)
    plain = Attention(GROUPS, causal=True, positions=positions)
    plain.load_state_dict(layer.state_dict())
    assert torch.allclose(layer(hidden), plain(hidden), atol=1e-6)
    longer = torch.cat([hidden, torch.randn(2, 8, 32)], 1)
    assert torch.allclose(layer(longer)[:, :12], plain(hidden), atol=1e-6)
    assert not torch.allclose(layer(longer), plain(longer), atol=1e-3)


def test_bad_knobs_are_refused() -> None:
    for chunk, budget in ((0, 12), (4, 8), (4, 13)):
        with pytest.raises(InputError, match="whole chunks"):
            LongHeadsAttention(SHAPE, chunk=chunk, budget=budget)
    with pytest.raises(InputError, match="RotaryPositions"):
        LongHeadsAttention(SHAPE, positions=torch.nn.Identity())  # type: ignore[arg-type]
