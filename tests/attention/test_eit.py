"""Many-to-many heads against their definition and plain attention."""

from __future__ import annotations

import pytest
import torch

import polyhead
from polyhead.attention import Attention, AttentionShape
from polyhead.attention.eit import EnhancedInteractiveAttention, head_consensus
from polyhead.errors import InputError
from polyhead.heads.weights import read_weights
from tests.attention.cases import Case
from tests.tiny import tiny

SHAPE = AttentionShape(32, 4, kv_heads=2)
CASES = {
    "eit": Case(lambda causal: EnhancedInteractiveAttention(SHAPE, causal=causal)),
    "eit-efficient": Case(lambda causal: EnhancedInteractiveAttention(SHAPE, causal=causal, efficient=True)),
}


@pytest.mark.parametrize("efficient", [True, False])
def test_logits_by_grouped_convolutions(efficient: bool) -> None:
    layer = EnhancedInteractiveAttention(SHAPE, efficient=efficient).double()
    q, k, _, call = layer._prepared(torch.randn(2, 5, 32, dtype=torch.float64), None)
    maps = torch.einsum("bhid,bgjd->bhgij", q, k.repeat_interleave(2, 1)).flatten(1, 2) / 8**0.5
    conv = torch.nn.functional.conv2d
    first = conv(maps, layer.inner_in.reshape(32, 4, 1, 1), groups=4).relu()
    if efficient:
        wanted = conv(first, layer.merge[..., None, None])
    else:
        own = conv(first, layer.inner_out.reshape(4, 8, 1, 1), groups=4)
        wanted = conv(conv(own, layer.cross_in[..., None, None]).relu(), layer.cross_out[..., None, None])
    assert torch.allclose(layer.score(q, k, call), wanted, atol=1e-9)


@pytest.mark.parametrize("efficient", [True, False])
def test_networks_that_select_are_the_trained_layer(efficient: bool) -> None:
    trained, hidden = read_weights(polyhead.load(tiny("bert")), fold=False).layers[0], torch.randn(1, 5, 32)
    layer = EnhancedInteractiveAttention.from_mha(trained, efficient=efficient)
    assert torch.allclose(layer(hidden), Attention.from_mha(trained)(hidden), atol=1e-6)


def test_consensus_and_wrong_counts() -> None:
    same = torch.rand(1, 1, 3, 3).expand(1, 4, 3, 3)
    assert head_consensus(same) == pytest.approx(1)
    assert head_consensus(torch.eye(4).reshape(1, 4, 2, 2)) == pytest.approx(0)
    with pytest.raises(InputError, match="multiple of the heads"):
        EnhancedInteractiveAttention(SHAPE, inner=6)
    with pytest.raises(InputError, match="two or more"):
        EnhancedInteractiveAttention(SHAPE, inner=4).select_own()
