"""Mixture of heads against its definition, its losses, and plain attention."""

from __future__ import annotations

import pytest
import torch

import polyhead
from polyhead.attention import Attention, AttentionShape
from polyhead.attention.moh import MixtureOfHeads
from polyhead.errors import InputError
from polyhead.heads.weights import read_weights
from tests.attention.cases import Case
from tests.tiny import tiny

SHAPE = AttentionShape(32, 4, kv_heads=2)
CASES = {
    # gradients=False: which heads are open is a hard choice, and bfloat16 may choose others
    "moh": Case(lambda causal: MixtureOfHeads(SHAPE, causal=causal, shared=1, top_k=2), gradients=False),
    "moh-all": Case(lambda causal: MixtureOfHeads(SHAPE, causal=causal, shared=2, top_k=2)),
    "moh-query-norm": Case(
        lambda causal: MixtureOfHeads(SHAPE, causal=causal, shared=1, top_k=1, router="query-norm"), gradients=False
    ),
}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_output_and_loss_by_definition() -> None:
    torch.manual_seed(0)
    layer, hidden = MixtureOfHeads(AttentionShape(32, 8), shared=2, top_k=3).double(), randn(1, 6, 32)
    heads, out = layer.heads_of(hidden), layer(hidden)
    chosen, mean = torch.zeros(6, 6), torch.zeros(6, dtype=torch.float64)
    for t in range(6):
        x = hidden[0, t]
        first, second = (layer.groups.weight @ x).softmax(0)
        routed = (layer.route.weight @ x).softmax(0)
        always = first * (layer.share.weight @ x).softmax(0)
        best = sorted(range(6), key=lambda i, routed=routed: -routed[i])[:3]
        chosen[t, best] = 1
        mean += routed / 6
        gate = [*always, *(second * routed[i] if i in best else 0 for i in range(6))]
        parts = [g * layer.o_proj.weight[:, 4 * i : 4 * i + 4] @ heads[0, i, t] for i, g in enumerate(gate)]
        assert torch.allclose(out[0, t], torch.stack(parts).sum(0), atol=1e-10)
    assert layer.balance_loss is not None
    assert torch.allclose(layer.balance_loss, (mean * chosen.mean(0)).sum(), atol=1e-10)


def test_scaled_gates_are_one_on_average() -> None:
    torch.manual_seed(0)
    layer, hidden = MixtureOfHeads(AttentionShape(32, 8), shared=2, top_k=3, scaled=True).double(), randn(1, 6, 32)
    gates = layer.gates(hidden)[0]
    for t in range(6):
        x = hidden[0, t]
        first, second = 2 * (layer.groups.weight @ x).softmax(0)
        always = 2 * (layer.share.weight @ x).softmax(0)
        routed = (layer.route.weight @ x).softmax(0)
        best = sorted(range(6), key=lambda i, routed=routed: -routed[i])[:3]
        total = sum(routed[i] for i in best)
        wanted = [first * each for each in always] + [
            second * 3 * routed[i] / total if i in best else torch.zeros(()).double() for i in range(6)
        ]
        assert torch.allclose(gates[t], torch.stack(wanted))
        assert (gates[t, :2].sum() / 2 + gates[t, 2:].sum() / 3).item() == pytest.approx(2)
    alone = MixtureOfHeads(AttentionShape(32, 8), shared=0, top_k=3, scaled=True).double()
    assert torch.allclose(alone.gates(hidden).sum(-1), torch.full((1, 6), 3.0).double())
    with pytest.raises(InputError, match="router='linear'"):
        MixtureOfHeads(SHAPE, router="query-norm", scaled=True)


def test_balance_is_least_at_uniform_use_and_ignores_padding() -> None:
    layer = MixtureOfHeads(AttentionShape(32, 4), shared=0, top_k=1)
    even = torch.eye(4)[None]
    assert layer._balance(even, even, None).item() == pytest.approx(0.25)
    uneven = torch.eye(4)[[0, 0, 0, 1]][None]
    assert layer._balance(uneven, uneven, None).item() == pytest.approx(10 / 16)
    real = torch.tensor([[False, False, True, True]])
    assert layer._balance(uneven, uneven, real).item() == pytest.approx(0.5)
    hidden = torch.randn(1, 4, 32)
    layer(hidden)
    alone = layer.balance_loss
    layer(torch.cat([torch.randn(1, 3, 32), hidden], 1), torch.arange(7)[None] >= 3)
    assert torch.allclose(alone, layer.balance_loss)


def test_all_heads_open_is_the_trained_layer() -> None:
    model = polyhead.load(tiny("bert"))
    trained, hidden = read_weights(model, fold=False).layers[0], torch.randn(1, 5, 32)
    same = MixtureOfHeads.from_mha(trained, shared=1, top_k=3, router="query-norm")
    assert torch.allclose(same(hidden), Attention.from_mha(trained)(hidden), atol=1e-6)
    fewer = MixtureOfHeads.from_mha(trained, shared=1, top_k=1, router="query-norm")
    gates, lengths = fewer.gates(hidden), fewer.split(fewer.q_proj(hidden)).norm(dim=-1)[0].T[:, 1:]
    assert torch.equal(gates[0, :, 1:].argmax(1), lengths.argmax(1))
    assert torch.equal(gates.detach().round(), gates.detach().clamp(0, 1).round())
    assert int(gates.round().sum()) == 10


def test_routers_learn_and_wrong_counts_are_refused() -> None:
    layer = MixtureOfHeads(SHAPE, shared=1, top_k=2)
    layer(torch.randn(2, 5, 32)).square().sum().backward()
    assert all(router.weight.grad.abs().sum() > 0 for router in (layer.route, layer.groups))
    hard = MixtureOfHeads(SHAPE, shared=1, top_k=1, router="query-norm")
    gates = hard.gates(torch.randn(2, 5, 32))
    (gates * torch.randn_like(gates)).sum().backward()
    assert hard.q_proj.weight.grad.abs().sum() > 0
    for shared, top_k in ((4, 1), (1, 4), (0, 0)):
        with pytest.raises(InputError, match="expected shared"):
            MixtureOfHeads(SHAPE, shared=shared, top_k=top_k)
    with pytest.raises(InputError, match="query-norm"):
        MixtureOfHeads(SHAPE, router="random")  # type: ignore[arg-type]
