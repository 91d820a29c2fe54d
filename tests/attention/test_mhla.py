"""Token-level multi-head linear attention against its definition."""

from __future__ import annotations

import pytest
import torch

from polyhead.attention import AttentionShape, LinearAttention
from polyhead.attention.mhla import TokenLevelMultiHeadLinearAttention as Mhla
from polyhead.attention.mhla import block_blend
from polyhead.errors import InputError
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4)
GROUPS = AttentionShape(32, 4, kv_heads=2, bias=True)
CASES = {
    "mhla": Case(lambda causal: Mhla(GROUPS, causal=causal, blocks=4, block_size=3 if causal else None)),
    "mhla-sized": Case(lambda causal: Mhla(SHAPE, causal=causal, blocks=2, block_size=4, start="local")),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("blocks", "size"), [(3, 4), (4, None), (2, 3), (16, None), (16, 1)])
def test_by_definition(causal: bool, blocks: int, size: int | None) -> None:
    torch.manual_seed(0)
    layer = Mhla(SHAPE, causal=causal, blocks=blocks, block_size=size).double()
    torch.nn.init.uniform_(layer.blend)
    hidden = torch.randn(1, 11, 32, dtype=torch.float64)
    q, k, v = (layer.split(proj(hidden))[0] for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = q.relu() + 1e-6, k.relu() + 1e-6
    size = size or (64 if causal else -(-11 // blocks))
    wanted = torch.zeros_like(q)
    for h in range(4):
        for i in range(11):
            state, total = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
            for j in range(i + 1 if causal else 11):
                blend = layer.blend[min(i // size, blocks - 1), min(j // size, blocks - 1)]
                state = state + blend * torch.outer(k[h, j], v[h, j])
                total = total + blend * k[h, j]
            wanted[h, i] = q[h, i] @ state / (q[h, i] @ total)
    assert torch.allclose(layer.heads_of(hidden)[0], wanted, atol=1e-9)
    weights = layer.attention_weights(hidden)[0]
    assert torch.allclose(weights @ v, wanted, atol=1e-9)
    assert torch.allclose(weights.sum(-1), torch.ones(4, 11, dtype=torch.float64))


@pytest.mark.parametrize("causal", [True, False])
def test_one_block_is_linear_attention(causal: bool) -> None:
    relu = type("Relu", (LinearAttention,), {"features": lambda self, states, role: states.relu() + 1e-6})
    plain = relu(SHAPE, causal=causal).double()
    hidden = torch.randn(2, 9, 32, dtype=torch.float64)
    for blocks, start in ((1, "cos"), (4, "even")):
        layer = Mhla(SHAPE, causal=causal, blocks=blocks, block_size=3 if causal else None, start=start).double()
        layer.load_state_dict(plain.state_dict(), strict=False)
        assert torch.allclose(layer(hidden), plain(hidden), atol=1e-9)


def test_blocks_raise_the_rank_above_the_width_of_a_head() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1, 48, 32, dtype=torch.float64)
    rank = {
        blocks: torch.linalg.matrix_rank(
            Mhla(SHAPE, blocks=blocks, start="exp").double().attention_weights(hidden)[0, 0]
        ).item()
        for blocks in (1, 4)
    }
    assert rank[1] <= 8 < rank[4] <= 32


@pytest.mark.parametrize("start", ["cos", "linear", "exp", "local", "even"])
def test_blend_falls_with_distance(start: str) -> None:
    blend = block_blend(5, start)
    assert torch.allclose(blend.sum(0), torch.ones(5))
    assert (blend[:, 0].diff() <= 1e-6).all()
    assert (blend >= -1e-6).all()
    with pytest.raises(InputError, match="expected one of cos"):
        block_blend(5, "other")
    with pytest.raises(InputError, match="at least 1"):
        Mhla(SHAPE, blocks=0)
