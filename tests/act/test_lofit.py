"""LoFiT: it finds the head a task needs, learns an offset there, and folds it without changing the output."""

from __future__ import annotations

import pytest
import torch
from tiny import inputs_for, tiny

import polyhead
from polyhead.act import Gate, LoFiT, Steer
from polyhead.act.lofit import fold
from polyhead.errors import InputError
from polyhead.heads.tasks import Batch, FunctionTask
from polyhead.model import HeadedModel


def _task(model: HeadedModel, target: torch.Tensor) -> FunctionTask:
    inputs = inputs_for("bert")

    def predict(outputs: object, batch: Batch) -> torch.Tensor:
        return -1e3 * (outputs.last_hidden_state - target).pow(2).mean((1, 2))  # type: ignore[attr-defined]

    return FunctionTask([Batch(inputs, {}, 2)], predict)


@pytest.fixture
def model() -> HeadedModel:
    return polyhead.load(tiny("bert"))


def test_localize_finds_the_head_that_was_scaled(model: HeadedModel) -> None:
    gates = torch.ones(2, 4)
    gates[1, 2] = 3.0
    with torch.no_grad(), Gate(gates).on(model):
        target = model(**inputs_for("bert")).last_hidden_state
    found = LoFiT(steps=40, learning_rate=0.05, l1=1e-3).localize(model, _task(model, target))
    assert found.top(1) == [(1, 2)]


def test_fit_learns_the_offset_in_the_chosen_heads_only(model: HeadedModel) -> None:
    vectors = torch.zeros(2, 4, 8)
    vectors[1, 0] = torch.linspace(-1, 1, 8)
    with torch.no_grad(), Steer(vectors).on(model):
        target = model(**inputs_for("bert")).last_hidden_state
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    learned = LoFiT(steps=150, learning_rate=0.05).fit(model, _task(model, target), [(1, 0)])
    with torch.no_grad(), learned.on(model):
        after = model(**inputs_for("bert")).last_hidden_state
    torch.testing.assert_close(after, target, atol=2e-3, rtol=0)
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())
    assert all(parameter.grad is None for parameter in model.module.parameters())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3", "vit", "mpnet"])
def test_folded_equals_steered(family: str) -> None:
    model, inputs = polyhead.load(tiny(family)), inputs_for(family)
    offsets = Steer(torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)), 0.5, [(0, 1), (1, 2)])
    with torch.no_grad():
        plain = model(**inputs).last_hidden_state
        with offsets.on(model):
            steered = model(**inputs).last_hidden_state
        torch.testing.assert_close(fold(model, offsets)(**inputs).last_hidden_state, steered, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(**inputs).last_hidden_state, plain)


def test_what_cannot_be_folded_is_refused(model: HeadedModel) -> None:
    with pytest.raises(InputError, match="only offsets at all tokens"):
        fold(model, Steer(torch.zeros(2, 4, 8), positions="last"))
    with pytest.raises(InputError, match="share one output projection"):
        fold(polyhead.load(tiny("albert")), Steer(torch.zeros(2, 4, 8)))
