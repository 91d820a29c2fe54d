"""Every action on every kind of model: identity, undone after the block, threads, gradients, composition."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import inputs_for, tiny

import polyhead
from polyhead import HeadMap
from polyhead.act import (
    Action,
    Gate,
    LearnedGates,
    MeanAblate,
    ProjectOut,
    Replace,
    ReplaceRecorded,
    SoftInjection,
    Steer,
)
from polyhead.errors import InputError
from polyhead.model import HeadedModel

FAMILIES = ["bert", "gpt2", "llama", "gemma3", "vit", "mpnet"]
SHAPE = (2, 4, 8)
GENERATOR = torch.Generator().manual_seed(3)
VECTORS = torch.randn(SHAPE, generator=GENERATOR)
HALF = np.array([[True, False, True, False], [False, False, True, True]])


def _recorded(model: HeadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with model.record("heads") as recording, torch.no_grad():
        model(**inputs)
    return recording.heads


def _learned(start: float) -> LearnedGates:
    return LearnedGates(2, 4, start=start).eval()


Make = Callable[[HeadedModel, dict[str, torch.Tensor]], Action]
# For each action: one that changes nothing, and one that does.
ACTIONS: dict[str, tuple[Make, Make]] = {
    "gate": (lambda m, i: Gate(torch.ones(2, 4)), lambda m, i: Gate(torch.linspace(-1, 2, 8).reshape(2, 4))),
    "steer": (lambda m, i: Steer(VECTORS, 0.0), lambda m, i: Steer(VECTORS, 0.5, HALF)),
    "replace": (lambda m, i: Replace(VECTORS, []), lambda m, i: Replace(VECTORS, HALF)),
    "mean-ablate": (lambda m, i: MeanAblate(VECTORS, []), lambda m, i: MeanAblate(VECTORS, [(1, 2)])),
    "replace-recorded": (
        lambda m, i: ReplaceRecorded(_recorded(m, i)),
        lambda m, i: ReplaceRecorded(_recorded(m, i).flip(0) + 1, HALF),
    ),
    "learned-gates": (lambda m, i: _learned(9.0), lambda m, i: _learned(0.3)),
    "project-out": (
        lambda m, i: ProjectOut(torch.zeros(2, 4, 3, 8)),
        lambda m, i: ProjectOut(torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(1))),
    ),
    "soft-injection": (
        lambda m, i: SoftInjection(VECTORS, 0.0, "all"),
        lambda m, i: SoftInjection(VECTORS, torch.linspace(0, 1, 8).reshape(2, 4), "last"),
    ),
}


def states(model: HeadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).last_hidden_state


@pytest.fixture(scope="module", params=FAMILIES)
def given(request: pytest.FixtureRequest) -> tuple[HeadedModel, dict[str, torch.Tensor]]:
    return polyhead.load(tiny(request.param)), inputs_for(request.param)


@pytest.mark.parametrize("name", ACTIONS)
class TestEveryAction:
    def test_identity_is_bit_equal_and_the_other_is_not(self, given, name: str) -> None:
        model, inputs = given
        nothing, something = (make(model, inputs) for make in ACTIONS[name])
        with torch.no_grad():
            plain = states(model, inputs)
            with nothing.on(model):
                assert torch.equal(states(model, inputs), plain)
            with something.on(model):
                assert not torch.allclose(states(model, inputs), plain, atol=1e-4)

    def test_gone_after_the_block_and_after_an_exception(self, given, name: str) -> None:
        model, inputs = given
        action = ACTIONS[name][1](model, inputs)
        hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.module.modules()]
        with torch.no_grad():
            plain = states(model, inputs)
            with action.on(model):
                states(model, inputs)
            assert torch.equal(states(model, inputs), plain)
            with pytest.raises(RuntimeError, match="on purpose"), action.on(model):
                raise RuntimeError("on purpose")
            assert torch.equal(states(model, inputs), plain)
        assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.module.modules()]

    def test_only_the_thread_that_put_it_on_sees_it(self, given, name: str) -> None:
        model, inputs = given
        action = ACTIONS[name][1](model, inputs)
        seen: list[torch.Tensor] = []

        def other() -> None:
            with torch.no_grad():
                seen.append(states(model, inputs))

        with torch.no_grad():
            plain = states(model, inputs)
            with action.on(model):
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
        assert torch.equal(seen[0], plain)

    def test_gradients_flow_to_the_input(self, given, name: str) -> None:
        model, inputs = given
        action = ACTIONS[name][1](model, inputs)
        with action.on(model):
            loss = states(model, inputs).pow(2).sum()
        model.module.zero_grad()
        loss.backward()
        gradients = [p.grad.abs().sum() for p in model.module.parameters() if p.grad is not None]
        assert gradients
        assert all(torch.isfinite(g) for g in gradients)
        assert float(gradients[0]) > 0

    def test_its_parameters_are_learned_through(self, given, name: str) -> None:
        model, inputs = given
        parameter = torch.full((2, 4), 0.5, requires_grad=True)
        vectors = VECTORS.clone().requires_grad_(True)
        learned = LearnedGates(2, 4, "sigmoid")
        choices: dict[str, tuple[Action, torch.Tensor]] = {
            "gate": (Gate(parameter), parameter),
            "steer": (Steer(vectors), vectors),
            "replace": (Replace(vectors, HALF), vectors),
            "mean-ablate": (MeanAblate(vectors, HALF), vectors),
            "learned-gates": (learned, learned.logits),
            "soft-injection": (SoftInjection(VECTORS, parameter, "all"), parameter),
        }
        if name not in choices:
            pytest.skip("has no parameters")
        action, leaf = choices[name]
        with action.on(model):
            states(model, inputs).pow(2).sum().backward()
        assert leaf.grad is not None
        assert float(leaf.grad.abs().sum()) > 0


def test_two_gates_multiply_and_two_steers_add(given) -> None:
    model, inputs = given
    a, b = torch.linspace(0.2, 2, 8).reshape(2, 4), torch.linspace(1.5, -1, 8).reshape(2, 4)
    with torch.no_grad():
        with Gate(a).on(model), Gate(b).on(model):
            nested = states(model, inputs)
        with Gate(a * b).on(model):
            torch.testing.assert_close(states(model, inputs), nested, atol=1e-5, rtol=1e-5)
        with Steer(VECTORS, 0.5).on(model), Steer(VECTORS.flip(0), 0.25).on(model):
            nested = states(model, inputs)
        with Steer(0.5 * VECTORS + 0.25 * VECTORS.flip(0)).on(model):
            torch.testing.assert_close(states(model, inputs), nested, atol=1e-5, rtol=1e-5)


def test_each_does_what_it_says_to_the_heads(given) -> None:
    model, inputs = given
    plain = _recorded(model, inputs)
    layer = 0  # whose input no action has changed
    with torch.no_grad(), Replace(VECTORS, HALF).on(model), model.record("heads") as after:
        states(model, inputs)
    expected = torch.where(torch.tensor(HALF[layer])[None, :, None, None], VECTORS[layer][:, None], plain[:, layer])
    torch.testing.assert_close(after.heads[:, layer], expected)
    with torch.no_grad(), SoftInjection(VECTORS, 0.25, "last").on(model), model.record("heads") as after:
        states(model, inputs)
    expected = plain[:, layer].clone()
    expected[:, :, -1] = 0.75 * expected[:, :, -1] + 0.25 * VECTORS[layer]
    torch.testing.assert_close(after.heads[:, layer], expected)


def test_chosen_token_of_each_row() -> None:
    model, inputs = polyhead.load(tiny("bert")), inputs_for("bert")
    with torch.no_grad(), model.record("heads") as plain:
        states(model, inputs)
    with torch.no_grad(), Steer(VECTORS).at(torch.tensor([2, 5])).on(model), model.record("heads") as after:
        states(model, inputs)
    difference = (after.heads - plain.heads)[:, 0].abs().sum((1, 3))
    assert (difference > 1e-6).nonzero().tolist() == [[0, 2], [1, 5]]


def test_prompt_position_leaves_single_tokens_alone() -> None:
    model = polyhead.load(tiny("llama"))
    one = {"input_ids": torch.tensor([[5]])}
    with torch.no_grad(), Steer(VECTORS, positions="prompt").on(model):
        changed = states(model, one)
    with torch.no_grad():
        assert torch.equal(changed, states(model, one))


@torch.no_grad()
def test_project_out_removes_what_heads_write_along_hidden_directions() -> None:
    model, inputs = polyhead.load(tiny("gpt2")), inputs_for("gpt2")
    directions = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))
    directions = torch.cat([directions, directions.sum(0, keepdim=True)])  # a dependent one
    heads = [(0, 1), (1, 3)]
    with torch.no_grad(), ProjectOut.from_hidden(model, directions, heads).on(model):
        with model.record("heads") as after:
            states(model, inputs)
        plain_after = after.heads.double()
    for layer in range(2):
        written = torch.einsum("bhtd,hdm->bhtm", plain_after[:, layer], model.output_weight(layer).double())
        along = (written @ directions.double().T).abs().amax((0, 2, 3))
        for head in range(4):
            assert (along[head].item() < 1e-5) == ((layer, head) in heads)


def test_project_out_twice_is_a_mirror_undone_by_itself() -> None:
    model, inputs = polyhead.load(tiny("bert")), inputs_for("bert")
    action = ProjectOut(torch.randn(2, 4, 2, 8, generator=torch.Generator().manual_seed(2)), strength=2.0)
    with torch.no_grad():
        plain = states(model, inputs)
        with action.on(model), action.on(model):
            torch.testing.assert_close(states(model, inputs), plain, atol=1e-5, rtol=1e-5)


def test_mean_heads_counts_no_padding(minilm_path: str) -> None:
    from polyhead.act import mean_heads

    model = polyhead.load(minilm_path)
    texts = ["short", "a text that is rather longer than the first one", "and one between them"]
    together = mean_heads(model, texts, batch_size=3)
    outputs = []
    for text in texts:
        with model.record("heads") as recording, torch.no_grad():
            model(**model.tokenize([text]))
        outputs.append(recording.heads[0].double())
    expected = torch.cat(outputs, dim=2).mean(2)
    torch.testing.assert_close(together, expected, atol=1e-5, rtol=1e-5)
    last = torch.stack([output[:, :, -1] for output in outputs]).mean(0)
    torch.testing.assert_close(mean_heads(model, texts, positions="last"), last, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Steer(torch.zeros(2, 4)), r"\[layers, heads, head_dim\]"),
        (lambda: Steer(VECTORS, heads=[(0, 4)]), "Head 4 of layer 0"),
        (lambda: Steer(VECTORS, heads=np.ones((2, 3), dtype=bool)), "boolean mask"),
        (lambda: Steer(VECTORS, positions="first"), "expected 'all'"),  # type: ignore[arg-type]
        (lambda: SoftInjection(VECTORS, torch.zeros(3)), "alpha has the shape"),
        (lambda: ReplaceRecorded(torch.zeros(2, 4, 8)), "Recorded heads"),
        (lambda: ProjectOut(torch.zeros(2, 4, 8)), "expected .*from_hidden"),
        (lambda: LearnedGates(2, 4, "soft"), "kind is 'soft'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message.split(".*")[0]):
        make()


def test_vectors_for_another_model_are_refused() -> None:
    model = polyhead.load(tiny("bert"))
    with pytest.raises(InputError, match="layers, heads, head_dim"), Steer(torch.zeros(3, 4, 8)).on(model):
        pass
    with pytest.raises(InputError, match="same length"), ReplaceRecorded(torch.zeros(2, 2, 4, 3, 8)).on(model):
        model(**inputs_for("bert"))
    with pytest.raises(InputError, match="2 rows"), Steer(VECTORS, positions=torch.tensor([1, 2, 3])).on(model):
        model(**inputs_for("bert"))


def test_bfloat16_stays_bfloat16() -> None:
    model, inputs = polyhead.load(tiny("llama").bfloat16()), inputs_for("llama")
    for _, make in ACTIONS.values():
        with torch.no_grad(), make(model, inputs).on(model):
            assert states(model, inputs).dtype == torch.bfloat16


def test_gate_takes_a_headmap() -> None:
    model, inputs = polyhead.load(tiny("bert")), inputs_for("bert")
    values = np.array([[1.0, 0.0, np.nan, 1.0], [0.5, 1.0, 1.0, 1.0]])
    with torch.no_grad():
        with Gate(HeadMap(values)).on(model):
            given = states(model, inputs)
        with Gate(torch.nan_to_num(torch.tensor(values), nan=1.0)).on(model):
            assert torch.equal(states(model, inputs), given)
