"""Mixture of attentive experts against its definition, plain attention, and who learns in which round."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead
from polyhead.attention import Attention, AttentionShape
from polyhead.attention.mae_heads import BlockCoordinates, MixtureOfAttentiveExperts, text_responsibilities
from polyhead.errors import InputError
from polyhead.heads.weights import read_weights
from tests.attention.cases import Case
from tests.tiny import tiny

SHAPE = AttentionShape(32, 4, kv_heads=2, bias=True)


def moved(causal: bool, **knobs: str) -> MixtureOfAttentiveExperts:
    layer = MixtureOfAttentiveExperts(SHAPE, causal=causal, hidden=6, **knobs)  # type: ignore[arg-type]
    nn.init.normal_(layer.gate[2].weight, std=3)
    return layer


CASES = {"mae-heads": Case(lambda causal: moved(causal))}


@pytest.mark.parametrize("causal", [True, False])
def test_experts_by_definition(causal: bool) -> None:
    torch.manual_seed(0)
    layer, hidden = moved(causal).double(), torch.randn(2, 6, 32, dtype=torch.float64)
    heads, out = layer.heads_of(hidden), layer(hidden)
    matrix = layer.o_proj.weight.T.unflatten(0, (4, 8))
    for text in range(2):
        for t in range(6):
            mean = hidden[text, : t + 1 if causal else 6].mean(0)
            gate = (layer.gate[2].weight @ torch.tanh(layer.gate[0](mean)) + layer.gate[2].bias).softmax(0)
            parts = [heads[text, j, t] @ matrix[j] for j in range(4)]
            experts = [4 / 3 * sum(parts[j] for j in range(4) if j != i) for i in range(4)]
            wanted = sum(g * expert for g, expert in zip(gate, experts, strict=True)) + layer.o_proj.bias
            assert torch.allclose(out[text, t], wanted)
            best = experts[int(gate.argmax())] + layer.o_proj.bias
            layer.use = "best"
            assert torch.allclose(layer(hidden)[text, t], best)
            layer.use = "mixture"


def test_uniform_gate_is_the_trained_layer() -> None:
    trained, hidden = read_weights(polyhead.load(tiny("bert")), fold=False).layers[0], torch.randn(1, 5, 32)
    layer = MixtureOfAttentiveExperts.from_mha(trained)
    assert torch.allclose(layer(hidden), Attention.from_mha(trained)(hidden), atol=1e-6)


def test_draws_are_the_mixture_on_average() -> None:
    torch.manual_seed(0)
    layer, hidden = moved(False), torch.randn(1, 5, 32).expand(4000, -1, -1)
    mixture = layer(hidden)[0]
    layer.sampling = True
    drawn = layer(hidden)
    assert len(drawn[:, 0, 0].unique()) <= 4
    assert torch.allclose(drawn.mean(0), mixture, atol=0.02)
    assert torch.allclose(layer.eval()(hidden)[0], mixture, atol=1e-6)


def test_rounds_train_one_block() -> None:
    model = nn.Sequential(nn.Linear(32, 32), moved(False), moved(True))
    blocks, hidden = BlockCoordinates(model, gate_every=2), torch.randn(3, 5, 32)
    for number, block in ((0, "experts"), (1, "gates"), (2, "experts")):
        model.zero_grad()
        with blocks.round(number) as found:
            assert found == block
            assert all(layer.sampling == (block == "experts") for layer in blocks.layers)
            model(hidden).square().sum().backward()
        moved_now = {name for name, weight in model.named_parameters() if weight.grad is not None}
        assert moved_now == {name for name, _ in model.named_parameters() if (".gate." in name) == (block == "gates")}
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(layer.sampling for layer in blocks.layers)


def test_responsibilities_of_texts_ignore_padding() -> None:
    model, hidden = nn.Sequential(moved(False), moved(True)), torch.randn(3, 5, 32)
    found = text_responsibilities(model, hidden)
    assert found.shape == (3, 2, 4)
    assert torch.allclose(found[:, 0], model[0].responsibilities(hidden)[:, 0])
    assert torch.allclose(found[:, 1], model[1].responsibilities(model[0](hidden)).mean(1))
    real = torch.arange(8)[None] >= 3
    padded = torch.cat([torch.randn(1, 3, 32), hidden[:1]], 1)
    for layer in model:
        assert torch.allclose(
            text_responsibilities(layer, padded, real), text_responsibilities(layer, hidden[:1]), atol=1e-6
        )


def test_what_makes_no_mixture_is_refused() -> None:
    with pytest.raises(InputError, match="two heads"):
        MixtureOfAttentiveExperts(AttentionShape(32, 1))
    with pytest.raises(InputError, match="'mixture' or 'best'"):
        MixtureOfAttentiveExperts(SHAPE, use="worst")  # type: ignore[arg-type]
    for refused in (lambda: BlockCoordinates(nn.Linear(3, 3)), lambda: BlockCoordinates(moved(True), 1)):
        with pytest.raises(InputError, match="one layer or more"):
            refused()
    with pytest.raises(InputError, match="MixtureOfAttentiveExperts"):
        text_responsibilities(nn.Linear(3, 3), torch.ones(1, 3))
