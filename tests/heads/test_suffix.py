"""Changing one head at a time from the middle of the model gives what a plain loop over heads gives."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny import inputs_for, tiny, tower_of

from polyhead.act.gate import Gate
from polyhead.errors import InputError
from polyhead.heads.resume import block_states
from polyhead.heads.suffix import every_head, sweep, sweep_losses
from polyhead.heads.tasks import Batch, FunctionTask, Task
from polyhead.heads.trim import Trimmer
from polyhead.model import HeadedModel, load

FAMILIES = ["bert", "gpt2", "llama", "gemma3", "mistral", "modernbert", "deberta-v2", "vit", "clip-text"]
WHOLE = ["albert", "t5"]  # blocks cannot be skipped


def zero(layer: int, heads: object, z: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(z)


def headed(family: str) -> HeadedModel:
    return load(tiny(family), tower=tower_of(family))


@pytest.mark.parametrize("heads_at_once", [3])
@pytest.mark.parametrize("family", [*FAMILIES, *WHOLE])
def test_a_sweep_equals_the_plain_loop(family: str, heads_at_once: int) -> None:
    model, inputs = headed(family), inputs_for(family)
    with torch.inference_mode():
        whole = model(**inputs)[0]
        seen = []
        for found in sweep(model, Batch(inputs, {}, 2), zero, heads_at_once=heads_at_once):
            for copy, head in zip(found.outputs[0].unflatten(0, (-1, len(whole))), found.heads, strict=True):
                with Gate.off([(found.layer, head)], model).on(model):
                    plain = model(**inputs)[0]
                torch.testing.assert_close(copy, plain, rtol=0, atol=1e-5)
                assert (plain - whole).abs().max() > 1e-4  # the head did something
                seen.append((found.layer, head))
    assert seen == every_head(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_lies_above_is_run(family: str) -> None:
    model = headed(family)
    ran: list[int] = []
    with torch.inference_mode():
        first, last = model.attention_layers[0], model.attention_layers[-1]
        first.output_projection.register_forward_hook(lambda *_: ran.append(0))
        last.output_projection.register_forward_hook(lambda *_: ran.append(1))
        found = list(sweep(model, Batch(inputs_for(family), {}, 2), zero, heads=[(1, 0), (1, 2)], heads_at_once=1))
    assert len(found) == 2
    assert ran == [0, 1, 1, 1, 1]  # recorded whole, tried once from the last layer, then the last layer only


@pytest.mark.parametrize("family", WHOLE)
def test_models_that_cannot_resume_are_known(family: str) -> None:
    assert block_states(headed(family), Batch(inputs_for(family), {}, 2)) is None


def test_actions_below_at_and_above_stay_on() -> None:
    model, inputs = headed("llama"), inputs_for("llama")
    gates = torch.linspace(0.3, 1.8, 8).reshape(2, 4)
    with torch.inference_mode(), Gate(gates).on(model):
        for found in sweep(model, Batch(inputs, {}, 2), zero):
            for copy, head in zip(found.outputs[0].unflatten(0, (-1, 2)), found.heads, strict=True):
                with Gate.off([(found.layer, head)], model).on(model):
                    torch.testing.assert_close(copy, model(**inputs)[0], rtol=0, atol=1e-5)


def test_the_model_is_as_before_after_an_exception_and_for_other_threads() -> None:
    model, inputs = headed("bert"), inputs_for("bert")
    with torch.inference_mode():
        before = model(**inputs)[0]

        def elsewhere(layer: int, heads: object, z: torch.Tensor) -> torch.Tensor:
            def other() -> None:
                with torch.inference_mode():
                    found.append(model(**inputs)[0])

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            raise RuntimeError("in the middle")

        found: list[torch.Tensor] = []
        with pytest.raises(RuntimeError, match="middle"):
            list(sweep(model, Batch(inputs, {}, 2), elsewhere, heads=[(1, 0)]))
        assert torch.equal(found[0], before)
        assert torch.equal(model(**inputs)[0], before)
    assert all("forward" not in module.__dict__ for module in model.module.modules())


def test_bf16_equals_its_own_plain_loop() -> None:
    model, inputs = load(tiny("gemma3"), dtype="bfloat16"), inputs_for("gemma3")
    with torch.inference_mode():
        for found in sweep(model, Batch(inputs, {}, 2), zero):
            for copy, head in zip(found.outputs[0].unflatten(0, (-1, 2)), found.heads, strict=True):
                with Gate.off([(found.layer, head)], model).on(model):
                    torch.testing.assert_close(copy, model(**inputs)[0], rtol=0, atol=0.03)


def padded_task(columns: bool = False) -> Task:
    """Twelve texts of 3 to 14 tokens; the prediction is a mean over real tokens, or looks at the last column."""
    ids = torch.randint(3, 98, (12, 14), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(14) < torch.tensor([[3, 14, 5, 9, 4, 12, 3, 6, 7, 3, 4, 5]]).T).long()

    def predict(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        states = outputs[0][..., 0]
        if columns:
            return states[:, -1]
        weight = batch.inputs["attention_mask"]
        return (states * weight).sum(1) / weight.sum(1) + 0.0 * batch.targets["which"]

    batch = Batch({"input_ids": ids, "attention_mask": mask}, {"which": torch.arange(12.0)}, 12)
    return FunctionTask([batch], predict)


def test_trimmed_losses_equal_whole_ones() -> None:
    model, task = headed("bert"), padded_task()
    parts = Trimmer(model, task, examples=4).pieces(task.batches(model)[0])
    assert [part.inputs["input_ids"].shape[1] for _, part in parts] == [14, 6, 4]
    assert sorted(int(i) for examples, _ in parts for i in examples) == list(range(12))
    assert all(part.targets["which"].tolist() == examples.tolist() for examples, part in parts)
    trimmed = sweep_losses(model, task, zero)
    whole = sweep_losses(model, task, zero, trim=False)
    assert trimmed.shape == (2, 4, 12)
    assert abs(trimmed - whole).max() < 1e-5
    for layer, head in every_head(model):
        with Gate.off([(layer, head)], model).on(model), torch.inference_mode():
            batch = task.batches(model)[0]
            plain = task.loss(task.predict(model(**batch.inputs), batch), batch)
        assert abs(trimmed[layer, head] - plain.numpy()).max() < 1e-5


def test_a_task_that_looks_at_columns_is_not_trimmed() -> None:
    model, task = headed("bert"), padded_task(columns=True)
    trimmer, batch = Trimmer(model, task, examples=4), task.batches(headed("bert"))[0]
    assert [part is batch for _, part in trimmer.pieces(batch)] == [True]
    assert [part is batch for _, part in trimmer.pieces(batch)] == [True]  # nor later
    left = Batch({key: value.flip(1) for key, value in batch.inputs.items()}, batch.targets, 12)
    assert [part is left for _, part in Trimmer(model, task).pieces(left)] == [True]


def test_no_copies_are_refused() -> None:
    with pytest.raises(InputError, match="heads_at_once is 0"):
        list(sweep(headed("bert"), Batch(inputs_for("bert"), {}, 2), zero, heads_at_once=0))
