"""Complex attention against its definition in complex numbers, and rotary attention where it starts."""

from __future__ import annotations

import pytest
import torch

import polyhead
from polyhead.attention import Attention, AttentionShape
from polyhead.attention.complexformer import ComplexAttention, ComplexNetworkAttention
from polyhead.errors import InputError
from polyhead.heads.weights import read_weights
from polyhead.positions import RotaryPositions
from tests.attention.cases import Case
from tests.tiny import tiny

SHAPE = AttentionShape(32, 4, kv_heads=2)


def moved(layer: ComplexAttention) -> ComplexAttention:
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if "proj" not in name:
                weight += 0.3 * torch.randn_like(weight)
    return layer


CASES = {
    "complexformer": Case(lambda causal: moved(ComplexAttention(SHAPE, causal=causal))),
    "complexformer-network": Case(lambda causal: moved(ComplexNetworkAttention(SHAPE, causal=causal))),
}


@pytest.mark.parametrize("kind", ["identity", "affine", "network"])
def test_logits_by_definition(kind: str) -> None:
    torch.manual_seed(0)
    made = ComplexNetworkAttention(SHAPE) if kind == "network" else ComplexAttention(SHAPE, adapt=kind)  # type: ignore[arg-type]
    layer, hidden = moved(made).double(), torch.randn(1, 5, 32, dtype=torch.float64)
    plain_q, plain_k, _ = layer.project(hidden)
    q, k, _, call = layer._prepared(hidden, None)
    found = layer.score(q, k, call)
    for head in range(4):
        kv = head // 2
        queries = torch.complex(*plain_q[0, head].chunk(2, -1))
        keys = torch.complex(*plain_k[0, kv].chunk(2, -1))
        speed = torch.tensor([10_000.0 ** (-2 * i / 8) for i in range(4)]).double() * layer.stretch[kv].exp()
        for m in range(5):
            for n in range(5):
                apart = queries[m].angle() - keys[n].angle()
                if kind == "affine":
                    apart = layer.slope[kv] * apart + layer.offset[kv]
                if kind == "network":
                    assert isinstance(layer, ComplexNetworkAttention)
                    facing = torch.stack([apart.sin(), apart.cos()])
                    apart = apart + layer.out[kv] @ torch.tanh(layer.into[kv] @ facing)
                pairs = queries[m].abs() * keys[n].abs() * torch.cos(apart + speed * (m - n))
                assert torch.allclose(found[0, head, m, n], pairs.sum() / 8**0.5)


@pytest.mark.parametrize("kind", ["identity", "affine", "network"])
def test_starts_as_rotary_attention(kind: str) -> None:
    trained, hidden = read_weights(polyhead.load(tiny("bert")), fold=False).layers[0], torch.randn(1, 9, 32)
    wanted = Attention.from_mha(trained, positions=RotaryPositions(trained.query.shape[2]), causal=True)(hidden)
    if kind == "network":
        layer = ComplexNetworkAttention.from_mha(trained, causal=True)
    else:
        layer = ComplexAttention.from_mha(trained, causal=True, adapt=kind)
    assert torch.allclose(layer(hidden), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", [ComplexAttention, ComplexNetworkAttention])
def test_padding_of_zeros_passes_no_nan_back(kind: type[ComplexAttention]) -> None:
    layer, hidden = moved(kind(SHAPE)), torch.randn(1, 5, 32, requires_grad=True)
    layer(hidden, torch.arange(5)[None] < 3).square().sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in layer.parameters())


def test_fixed_frequencies_and_what_is_refused() -> None:
    layer = ComplexAttention(SHAPE, learn_frequencies=False, base=100.0)
    assert layer.stretch is None
    assert torch.allclose(layer.frequencies()[1], 100.0 ** (-torch.arange(0, 8, 2).double() / 8))
    with pytest.raises(InputError, match="even number"):
        ComplexAttention(AttentionShape(12, 4))
    with pytest.raises(InputError, match="no positions"):
        ComplexNetworkAttention(SHAPE, positions=RotaryPositions(8))
    with pytest.raises(InputError, match="'identity' or 'affine'"):
        ComplexAttention(SHAPE, adapt="mlp")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="1 unit"):
        ComplexNetworkAttention(SHAPE, width=0)
