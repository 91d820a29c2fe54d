"""Aaren's scan against softmax over every prefix."""

from __future__ import annotations

import pytest
import torch

from polyhead.attention import AttentionShape
from polyhead.attention.aaren import AarenAttention, attention_scan
from polyhead.errors import InputError
from polyhead.positions import RotaryPositions
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4)
CASES = {
    "aaren": Case(
        lambda causal: AarenAttention(AttentionShape(32, 4, kv_heads=2, bias=True), causal=causal), both=False
    )
}


@pytest.mark.parametrize("tokens", [2, 3, 7, 33])
@pytest.mark.parametrize("spread", [1.0, 1e4])
def test_scan_is_softmax_over_prefixes(tokens: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = spread * torch.randn(3, tokens, generator=generator, dtype=torch.float64)
    values = torch.randn(3, tokens, 5, generator=generator, dtype=torch.float64)
    scores.requires_grad_()
    _, total, sums = attention_scan(scores, values)
    found = sums / total[..., None]
    wanted = torch.stack([(scores[:, None, : i + 1].softmax(-1) @ values[:, : i + 1])[:, 0] for i in range(tokens)], 1)
    assert torch.allclose(found, wanted, atol=1e-10)
    ours, theirs = (torch.autograd.grad(each.square().sum(), scores)[0] for each in (found, wanted))
    assert torch.allclose(ours, theirs, atol=1e-10)


def test_layer_is_attention_of_one_query() -> None:
    torch.manual_seed(0)
    layer = AarenAttention(SHAPE).double()
    hidden = torch.randn(1, 9, 32, dtype=torch.float64)
    q, k, v = layer.q_proj(layer.query), layer.k_proj(hidden)[0], layer.v_proj(hidden)[0]
    out = []
    for i in range(1, 10):
        heads = []
        for h in range(0, 32, 8):
            e = (k[:i, h : h + 8] @ q[h : h + 8] / 8**0.5).exp()
            heads.append(e / e.sum() @ v[:i, h : h + 8])
        out.append(layer.o_proj(torch.cat(heads)))
    assert torch.allclose(layer(hidden)[0], torch.stack(out), atol=1e-10)
    values = layer.split(layer.v_proj(hidden))
    assert torch.allclose(layer.attention_weights(hidden) @ values, layer.heads_of(hidden), atol=1e-10)


def test_positions_are_refused() -> None:
    with pytest.raises(InputError, match="stands nowhere"):
        AarenAttention(SHAPE, positions=RotaryPositions(8))
