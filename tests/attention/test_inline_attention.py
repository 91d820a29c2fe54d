"""InLine attention against its explicit weight matrix and its local residual written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from polyhead.attention import AttentionShape, LinearAttention
from polyhead.attention.inline_attention import InLineAttention
from polyhead.errors import InputError
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4)
CASES = {
    "inline-attention": Case(
        lambda causal: InLineAttention(AttentionShape(32, 4, kv_heads=2, bias=True), causal=causal)
    ),
    "inline-attention-local": Case(lambda causal: InLineAttention(SHAPE, causal=causal, local=True), causal=False),
}


def parts(layer: InLineAttention, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = (layer.split(proj(hidden))[0] for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
    return q, k, v


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", [None, F.relu])
def test_weights_by_definition(causal: bool, kernel: object) -> None:
    torch.manual_seed(0)
    layer = InLineAttention(SHAPE, causal=causal, kernel=kernel).double()
    hidden = torch.randn(1, 9, 32, dtype=torch.float64)
    q, k, v = parts(layer, hidden)
    wanted = torch.zeros(4, 9, 9, dtype=torch.float64)
    for h in range(4):
        for i in range(9):
            seen = i + 1 if causal else 9
            left, right = (each if kernel is None else each.relu() for each in (q[h, i] / 8**0.5, k[h, :seen]))
            products = right @ left / seen
            wanted[h, i, :seen] = products - products.mean() + 1 / seen
    found = layer.attention_weights(hidden)[0]
    assert torch.allclose(found, wanted, atol=1e-12)
    assert torch.allclose(found.sum(-1), torch.ones(4, 9, dtype=torch.float64))
    assert torch.allclose(layer.heads_of(hidden)[0], wanted @ v, atol=1e-10)


def test_length_of_a_query_counts_here_and_not_where_weights_are_divided() -> None:
    torch.manual_seed(0)
    q, k, v = torch.rand(3, 1, 4, 6, 8, dtype=torch.float64)
    relu = type("Relu", (LinearAttention,), {"features": lambda self, states, role: states.relu()})
    for kind, moves in ((InLineAttention, True), (relu, False)):
        layer = kind(SHAPE)
        _, _, _, call = layer._prepared(torch.zeros(1, 6, 32), None)
        assert torch.allclose(layer.attend(q, k, v, call), layer.attend(3 * q, k, v, call), atol=1e-6) is not moves


@pytest.mark.parametrize("grid", [None, (3, 4)])
def test_neighbours_by_definition(grid: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    layer = InLineAttention(SHAPE, local=True, grid=grid).double()
    hidden = torch.randn(2, 12, 32, dtype=torch.float64)
    taps = layer.local(hidden.mean(1)[..., None]).view(2, 4, 8, -1)
    values, plain = layer.split(layer.v_proj(hidden)), layer.attention_weights(hidden)
    wanted = plain @ values
    rows, columns = grid or (1, 12)
    for place in range(12):
        row, column = divmod(place, columns)
        for tap in range(taps.shape[-1]):
            down, right = (tap // 3 - 1, tap % 3 - 1) if grid else (0, tap - 1)
            if 0 <= row + down < rows and 0 <= column + right < columns:
                there = (row + down) * columns + column + right
                wanted[:, :, place] = wanted[:, :, place] + taps[..., tap] * values[:, :, there]
    assert torch.allclose(layer.heads_of(hidden), wanted, atol=1e-10)


def test_refusals() -> None:
    with pytest.raises(InputError, match="all tokens"):
        InLineAttention(SHAPE, causal=True, local=True)
    with pytest.raises(InputError, match="without local"):
        InLineAttention(SHAPE, grid=(3, 3))
    with pytest.raises(InputError, match="3 x 3"):
        InLineAttention(SHAPE, local=True, grid=(3, 3))(torch.randn(1, 8, 32))
