"""Importance of heads: against its definition, finite differences, and models whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import inputs_for, tiny

from polyhead.act.gate import Gate
from polyhead.errors import InputError
from polyhead.heads.importance import (
    AblationImportance,
    GradientImportance,
    GreedyImportance,
    gate_gradients,
    mean_head_outputs,
)
from polyhead.heads.suffix import every_head
from polyhead.heads.tasks import Batch, FunctionTask, Task
from polyhead.model import HeadedModel, load


def task_of(family: str, batch: int = 4, rows_each: int = 1) -> Task:
    """Each example's prediction is a nonlinear number of its own real tokens."""
    inputs = inputs_for(family, batch)

    def predict(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        states = outputs[0]
        mask = batch.inputs.get("attention_mask", torch.ones(states.shape[:2]))[..., None]
        pooled = (states * mask).sum(1) / mask.sum(1)
        direction = torch.linspace(-1, 1, states.shape[-1], dtype=states.dtype)
        each = torch.tanh(pooled @ direction) + pooled[:, 0]
        return each.unflatten(0, (-1, rows_each)).sum(1)

    return FunctionTask([Batch(inputs, {}, batch // rows_each)], predict)


def losses(model: HeadedModel, task: Task, gates: torch.Tensor) -> torch.Tensor:
    with Gate(gates).on(model):
        return torch.cat([task.loss(task.predict(model(**b.inputs), b), b) for b in task.batches(model)])


def double(family: str) -> HeadedModel:
    return load(tiny(family).double())


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_gate_gradients_match_finite_differences(family: str) -> None:
    model = double(family)
    task = task_of(family)
    for batch in task.batches(model):
        batch.inputs.update({k: v.double() for k, v in batch.inputs.items() if v.is_floating_point()})
    found = gate_gradients(model, task, task.batches(model)[0]).double()
    assert found.shape == (4, 2, 4)
    for layer, head in every_head(model):
        gates = torch.ones(2, 4, dtype=torch.float64)
        ends = []
        for step in (1e-4, -1e-4):
            gates[layer, head] = 1 + step
            with torch.no_grad():
                ends.append(losses(model, task, gates))
        torch.testing.assert_close(found[:, layer, head], (ends[0] - ends[1]) / 2e-4, rtol=1e-4, atol=1e-7)


def test_the_mean_is_over_examples_of_absolute_values() -> None:
    model, task = double("bert"), task_of("bert", 4, rows_each=2)
    gradients = gate_gradients(model, task, task.batches(model)[0]).double().numpy()
    assert gradients.shape == (2, 2, 4)
    absolute = GradientImportance().score(model, task).values
    np.testing.assert_allclose(absolute, np.abs(gradients).mean(0), rtol=1e-6)
    np.testing.assert_allclose(GradientImportance(signed=True).score(model, task).values, -gradients.mean(0), rtol=1e-6)
    normalised = GradientImportance(normalise=True).score(model, task).values
    np.testing.assert_allclose(normalised, absolute / np.sqrt((absolute**2).sum(1, keepdims=True)), rtol=1e-6)


def test_weights_get_no_gradients_and_frozen_models_work() -> None:
    model, task = load(tiny("bert")), task_of("bert")
    expected = GradientImportance().score(model, task)
    assert all(parameter.grad is None for parameter in model.module.parameters())
    model.module.requires_grad_(False)
    assert GradientImportance().score(model, task) == expected


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_padding_changes_nothing(family: str) -> None:
    model, task = load(tiny(family)), task_of(family)
    (batch,) = task.batches(model)
    alone = []
    for row in range(4):
        length = int(batch.inputs["attention_mask"][row].sum())
        alone.append(Batch({k: v[row : row + 1, :length] for k, v in batch.inputs.items()}, {}, 1))
    one_by_one = FunctionTask(alone, task.predict)
    for score in (GradientImportance(), AblationImportance(), AblationImportance("mean")):
        together, single = score.score(model, task).values, score.score(model, one_by_one).values
        np.testing.assert_allclose(together, single, rtol=1e-3, atol=1e-6)


def test_ablation_is_the_rise_of_the_loss() -> None:
    model, task = double("llama"), task_of("llama")
    rises = AblationImportance().rises(model, task)
    ones = torch.ones(2, 4, dtype=torch.float64)
    with torch.no_grad():
        whole = losses(model, task, ones)
        for layer, head in every_head(model):
            gates = ones.clone()
            gates[layer, head] = 0
            np.testing.assert_allclose(rises[layer, head], (losses(model, task, gates) - whole).numpy(), atol=1e-10)
    np.testing.assert_allclose(AblationImportance().score(model, task).values, rises.mean(-1))


def test_mean_ablation_puts_the_mean_over_real_tokens_in() -> None:
    model, task = double("bert"), task_of("bert")
    (batch,) = task.batches(model)
    with torch.no_grad(), model.record("heads") as recording:
        model(**batch.inputs)
    real = batch.inputs["attention_mask"].bool()
    for layer, means in enumerate(mean_head_outputs(model, task)):
        z = recording.layer_heads(layer).movedim(1, 2)[real]  # [real tokens, heads, head_dim]
        torch.testing.assert_close(means, z.mean(0))

    mean = mean_head_outputs(model, task)[1][2]

    def swapped(layer: int, z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, :, 2] = mean
        return z

    with torch.no_grad(), model.tap_heads(swapped, layers=[1]):
        changed = losses(model, task, torch.ones(2, 4))
    with torch.no_grad():
        whole = losses(model, task, torch.ones(2, 4))
    np.testing.assert_allclose(
        AblationImportance("mean").rises(model, task)[1, 2], (changed - whole).numpy(), atol=1e-9
    )


def test_a_head_that_writes_nothing_is_worth_nothing() -> None:
    model, task = load(tiny("bert")), task_of("bert")
    model.attention_layers[1].output_projection.weight.data[:, 16:24] = 0  # what head 2 writes
    for score in (GradientImportance(), AblationImportance()):
        values = score.score(model, task).values
        assert values[1, 2] == 0
        assert (np.delete(values.ravel(), 6) != 0).all()
    order = GreedyImportance().score(model, task).values
    assert order[1, 2] < 1


def test_greedy_removes_the_least_costly_again_and_again() -> None:
    model, task = double("gpt2"), task_of("gpt2")
    left, gates, expected = every_head(model), torch.ones(2, 4, dtype=torch.float64), []
    while left:
        costs = {}
        for layer, head in left:
            trial = gates.clone()
            trial[layer, head] = 0
            with torch.no_grad():
                costs[layer, head] = float(losses(model, task, trial).mean())
        least = min(left, key=lambda head: costs[head])
        gates[least] = 0
        left.remove(least)
        expected.append(least)
    values = GreedyImportance().score(model, task).values
    assert sorted(every_head(model), key=lambda head: values[head]) == expected
    assert sorted(values.ravel()) == [i / 8 for i in range(1, 9)]
    half = GreedyImportance(fraction=0.5).score(model, task).values
    assert sorted(every_head(model), key=lambda head: half[head])[:4] == expected[:4]


def test_other_data_is_refused() -> None:
    with pytest.raises(InputError, match="expected a Task"):
        GradientImportance().score(load(tiny("bert")), ["a text"])
    with pytest.raises(InputError, match="'zero' or 'mean'"):
        AblationImportance("median").score(load(tiny("bert")), task_of("bert"))  # type: ignore[arg-type]
