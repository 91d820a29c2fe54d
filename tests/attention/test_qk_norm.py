"""Unit queries and keys against x-transformers, and what the norm promises."""

from __future__ import annotations

import pytest
import torch
from x_transformers.x_transformers import Attention as TheirAttention

from polyhead.attention import AttentionShape, QKNormAttention


@pytest.mark.parametrize("causal", [True, False])
def test_the_same_as_x_transformers(causal: bool) -> None:
    torch.manual_seed(0)
    theirs = TheirAttention(32, dim_head=8, heads=4, causal=causal, qk_norm=True, qk_norm_scale=7.0)
    ours = QKNormAttention(AttentionShape(32, 4), causal=causal)
    names = (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("o_proj", "to_out"))
    with torch.no_grad():
        ours.gain.fill_(7.0)
        for own, other in names:
            getattr(ours, own).weight.copy_(getattr(theirs, other).weight)
    hidden = torch.randn(2, 9, 32)
    assert torch.allclose(ours(hidden), theirs(hidden), atol=1e-5)


def test_logits_are_bounded_and_lengths_do_not_matter() -> None:
    torch.manual_seed(0)
    layer, hidden = QKNormAttention(AttentionShape(32, 4), length=64), 100 * torch.randn(1, 40, 32)
    q, k, _, call = layer._prepared(hidden, None)
    assert layer.score(q, k, call).abs().max() <= layer.gain.item() * (1 + 1e-5)
    before = layer(hidden)
    with torch.no_grad():
        layer.q_proj.weight[8:16] *= 30
        layer.k_proj.weight[16:24] *= 0.2
    assert torch.allclose(layer(hidden), before, atol=1e-4)
