"""Optimised, efficient and super attention against their definition and the paper's weight counts."""

from __future__ import annotations

import pytest
import torch

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.super_attention import EfficientAttention, OptimisedAttention, SuperAttention
from polyhead.errors import InputError
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4)


def moved(causal: bool, max_len: int = 80) -> SuperAttention:
    layer = SuperAttention(SHAPE, causal=causal, max_len=max_len)
    torch.nn.init.normal_(layer.align)
    return layer


CASES = {
    "optimised-attention": Case(lambda causal: OptimisedAttention(SHAPE, causal=causal)),
    "efficient-attention": Case(lambda causal: EfficientAttention(SHAPE, causal=causal)),
    "super-attention": Case(moved),
}


@pytest.mark.parametrize("causal", [True, False])
def test_super_attention_by_definition(causal: bool) -> None:
    layer, hidden = moved(causal, 9).double(), torch.randn(1, 5, 32, dtype=torch.float64)
    align = layer.align[:5, :5].tril() if causal else layer.align[:5, :5]
    heads = []
    for head in range(4):
        raw = hidden[0, :, 8 * head : 8 * head + 8]
        logits = layer.q_proj(hidden)[0, :, 8 * head : 8 * head + 8] @ raw.T / 8**0.5
        if causal:
            logits = logits + torch.full((5, 5), -torch.inf).triu(1)
        heads.append(logits.softmax(-1) @ (align @ raw))
    assert torch.allclose(layer(hidden)[0], torch.cat(heads, 1) @ layer.o_proj.weight.T, atol=1e-10)


def test_weights_are_three_quarters_and_a_half() -> None:
    whole, three, half = (
        sum(p.numel() for p in kind(SHAPE).parameters()) for kind in (Attention, OptimisedAttention, EfficientAttention)
    )
    assert (three / whole, half / whole) == (0.75, 0.5)


def test_optimised_is_plain_attention_with_the_identity_for_values() -> None:
    layer, plain, hidden = OptimisedAttention(SHAPE), Attention(SHAPE), torch.randn(2, 5, 32)
    plain.load_state_dict(layer.state_dict() | {"v_proj.weight": torch.eye(32)})
    assert torch.allclose(layer(hidden), plain(hidden), atol=1e-6)
    same = EfficientAttention(SHAPE)
    start = SuperAttention(SHAPE)
    start.load_state_dict(same.state_dict() | {"align": start.align})
    assert torch.allclose(start(hidden), same(hidden), atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="max_len=4"):
        moved(True, 4)(torch.randn(1, 5, 32))
    with pytest.raises(InputError, match="fill the features"):
        EfficientAttention(AttentionShape(32, 4, kv_heads=2))
