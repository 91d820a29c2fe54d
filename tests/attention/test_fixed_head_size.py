"""Heads of a size of their own."""

from __future__ import annotations

import torch
from attention.cases import Case

from polyhead.attention import Attention, AttentionShape
from polyhead.attention.fixed_head_size import FixedHeadSizeAttention

CASES = {
    "fixed-head-size": Case(lambda causal: FixedHeadSizeAttention(AttentionShape(32, 4), causal=causal, head_dim=12))
}


def test_width_of_model_and_heads_are_apart_and_logits_have_the_heads_rank() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 24, 32, dtype=torch.float64)
    for heads in (2, 16):
        thin = Attention(AttentionShape(32, heads)).double()
        fixed = FixedHeadSizeAttention(AttentionShape(32, heads), head_dim=20).double()
        for layer, size in ((thin, 32 // heads), (fixed, 20)):
            query, key, _ = layer.project(hidden)
            assert query.shape == (1, heads, 24, size)
            assert torch.linalg.matrix_rank(query @ key.mT).unique().tolist() == [size]
            assert layer(hidden).shape == hidden.shape
    assert FixedHeadSizeAttention(AttentionShape(32, 4, head_dim=6)).project(hidden.float())[0].shape[-1] == 6
