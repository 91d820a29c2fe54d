"""Actions inside attention: identity, undone, rows still sum to one, only chosen heads change, definitions."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from tiny import inputs_for, tiny

import polyhead
from polyhead.act import (
    Action,
    AttentionAction,
    AttentionBoost,
    AttentionCalibration,
    RedistributeAttention,
    Temperature,
)
from polyhead.act.attention import Run, span_mask
from polyhead.act.calibrate import calibration_gain, find_sinks
from polyhead.act.redistribute import massiveness, redistribute, sink_dimensions
from polyhead.errors import InputError, UnreadableModelError
from polyhead.heads.tasks import Batch, FunctionTask
from polyhead.model import HeadedModel
from polyhead.recording import Recording

FAMILIES = ["bert", "gpt2", "llama", "gemma3", "vit"]
HEADS = [(0, 1), (0, 2)]


class Flatten(AttentionAction):
    """Weights spread evenly over what they were on: a simple change whose result is known."""

    name, summary = "flatten", "even weights"

    def __init__(self, share: float, heads: object = None) -> None:
        super().__init__(heads)  # type: ignore[arg-type]
        self.share = share

    def reweigh(self, layer: int, weights: torch.Tensor, run: Run) -> torch.Tensor | None:
        seen = (weights > 0).float()
        return (1 - self.share) * weights + self.share * seen / seen.sum(-1, keepdim=True)


# One that changes nothing, and one that does.
ACTIONS: dict[str, tuple[Callable[[], Action], Callable[[], Action]]] = {
    "flatten": (lambda: Flatten(0.0), lambda: Flatten(0.7, HEADS)),
    "calibrate": (lambda: AttentionCalibration(1.0), lambda: AttentionCalibration(0.1, 1.2, HEADS)),
    "redistribute": (
        lambda: RedistributeAttention((1, 4), [0, 1], p=0.0),
        lambda: RedistributeAttention((1, 4), range(32), 0.9, 0.0, 0.0, tau=2.3, heads=HEADS),
    ),
    "boost": (
        lambda: AttentionBoost([(1, 4)], [0.0]),
        lambda: AttentionBoost([(1, 4), (5, 6)], [800.0, 300.0], HEADS),
    ),
    "temperature": (
        lambda: Temperature(1.0),
        lambda: Temperature(torch.tensor([[1.0, 0.01, 0.01, 1.0], [1.0, 1.0, 1.0, 1.0]])),
    ),
}


def states(model: HeadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).last_hidden_state


@pytest.fixture(scope="module", params=FAMILIES)
def given(request: pytest.FixtureRequest) -> tuple[HeadedModel, dict[str, torch.Tensor]]:
    module = tiny(request.param)
    sharpened = {"bert": "query.weight", "vit": "q_proj.weight"}.get(request.param)
    with torch.no_grad():  # of their own, these attend almost evenly: nothing would be a sink
        for name, parameter in module.named_parameters():
            if sharpened is not None and name.endswith(sharpened):
                parameter.mul_(30)
    return polyhead.load(module), inputs_for(request.param)


@pytest.mark.parametrize("name", ACTIONS)
class TestEveryAction:
    def test_identity_is_bit_equal(self, given, name: str) -> None:
        model, inputs = given
        with torch.no_grad():
            plain = states(model, inputs)
            with ACTIONS[name][0]().on(model):
                assert torch.equal(states(model, inputs), plain)

    def test_only_chosen_heads_change(self, given, name: str) -> None:
        model, inputs = given
        with torch.no_grad(), model.record("heads") as before:
            states(model, inputs)
        with torch.no_grad(), ACTIONS[name][1]().on(model), model.record("heads") as after:
            states(model, inputs)
        difference = (after.heads - before.heads)[:, 0].movedim(1, 2).abs().amax(-1)
        real = inputs.get("attention_mask", torch.ones(difference.shape[:2])).bool()
        moved = difference[real].amax(0)  # what padding attends to, whole rows masked, differs between kernels
        assert (moved > 1e-6).tolist() == [False, True, True, False]

    def test_gone_after_the_block_and_after_an_exception(self, given, name: str) -> None:
        model, inputs = given
        kernel = model.config._attn_implementation
        with torch.no_grad():
            plain = states(model, inputs)
            with ACTIONS[name][1]().on(model):
                changed = states(model, inputs)
            with pytest.raises(RuntimeError, match="on purpose"), ACTIONS[name][1]().on(model):
                raise RuntimeError("on purpose")
            assert torch.equal(states(model, inputs), plain)
        assert not torch.equal(changed, plain)
        assert model.config._attn_implementation == kernel
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.module.modules())

    def test_only_the_thread_that_put_it_on_sees_it(self, given, name: str) -> None:
        model, inputs = given
        seen: list[torch.Tensor] = []

        def other() -> None:
            with torch.no_grad():
                seen.append(states(model, inputs))

        with torch.no_grad():
            plain = states(model, inputs)
            with ACTIONS[name][1]().on(model):
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
        torch.testing.assert_close(seen[0], plain, atol=1e-6, rtol=1e-6)

    def test_gradients_flow(self, given, name: str) -> None:
        model, inputs = given
        model.module.zero_grad()
        with ACTIONS[name][1]().on(model):
            states(model, inputs).pow(2).sum().backward()
        gradients = [p.grad for p in model.module.parameters() if p.grad is not None]
        assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        assert float(gradients[0].abs().sum()) > 0

    def test_a_model_outside_the_interface_is_refused(self, name: str) -> None:
        model = polyhead.load(tiny("mpnet"))
        with pytest.raises(UnreadableModelError, match="attention interface"), ACTIONS[name][1]().on(model):
            pass

    def test_a_padded_batch_equals_one_by_one(self, name: str) -> None:
        if name in ("redistribute", "boost"):
            pytest.skip("its span is of one input")
        model = polyhead.load(tiny("bert"))
        ids = torch.randint(3, 98, (2, 7), generator=torch.Generator().manual_seed(2))
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        action = ACTIONS[name][1]()
        with torch.no_grad(), action.on(model):
            together = states(model, {"input_ids": ids, "attention_mask": mask})[1, :4]
            alone = states(model, {"input_ids": ids[1:, :4], "attention_mask": mask[1:, :4]})[0]
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def _first_layer(model: HeadedModel, inputs: dict[str, torch.Tensor], action: Action | None = None) -> Recording:
    with torch.no_grad():
        if action is None:
            with model.record("heads", "attention") as recording:
                states(model, inputs)
        else:
            with action.on(model), model.record("heads") as recording:
                states(model, inputs)
    return recording


def _values(model: HeadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Value vectors of layer 0, ``[batch, heads, tokens, head_dim]`` float64, one for each query head."""
    found = []

    def keep(layer: int, call: object) -> None:
        value = call.value.double()  # type: ignore[attr-defined]
        found.append(value.repeat_interleave(call.query.shape[1] // value.shape[1], 1))  # type: ignore[attr-defined]

    with torch.no_grad(), model.tap_attention(keep, layers=[0]):
        states(model, inputs)
    return found[0]


def test_changed_weights_give_the_outputs_they_should(given) -> None:
    model, inputs = given
    plain = _first_layer(model, inputs)
    weights = plain.attention[:, 0].double()
    seen = (weights > 0).double()
    expected = (seen / seen.sum(-1, keepdim=True)) @ _values(model, inputs)
    after = _first_layer(model, inputs, Flatten(1.0)).heads[:, 0].double()
    real = inputs.get("attention_mask", torch.ones(after.shape[0], after.shape[2])).bool()
    torch.testing.assert_close(after.movedim(1, 2)[real], expected.movedim(1, 2)[real], atol=1e-5, rtol=1e-4)
    with torch.no_grad(), Flatten(0.25).on(model), Flatten(0.5).on(model), model.record("heads") as nested:
        states(model, inputs)
    single = _first_layer(model, inputs, Flatten(0.75)).heads[:, 0]
    torch.testing.assert_close(nested.heads[:, 0], single, atol=1e-5, rtol=1e-5)


def test_temperature_is_its_definition() -> None:
    model, inputs = polyhead.load(tiny("llama")), inputs_for("llama", batch=1)
    inputs["attention_mask"][:] = 1
    calls = []

    def keep(layer: int, call: object) -> None:
        calls.append((call.query.double(), call.key.double()))  # type: ignore[attr-defined]

    with torch.no_grad(), model.tap_attention(keep, layers=[0]):
        states(model, inputs)
    query, key = calls[0]
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) / (0.3 * 8**0.5)
    scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), float("-inf"))
    expected = torch.softmax(scores, -1) @ _values(model, inputs)
    after = _first_layer(model, inputs, Temperature(0.3)).heads[:, 0]
    torch.testing.assert_close(after.double(), expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(InputError, match="not above 0"):
        Temperature(0.0)


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_boost_is_its_definition(family: str) -> None:
    model, inputs = polyhead.load(tiny(family)), inputs_for(family)
    plain = _first_layer(model, inputs)
    weights = plain.attention[:, 0].double()
    calls = []
    with torch.no_grad(), model.tap_attention(lambda _, call: calls.append(call), layers=[0]):
        states(model, inputs)
    call = calls[0]
    groups = call.query.shape[1] // call.key.shape[1]
    scores = call.query.double() @ call.key.double().repeat_interleave(groups, 1).transpose(-1, -2)
    scores = scores * call.kwargs["scaling"]
    cap = call.kwargs.get("softcap")
    scores = torch.tanh(scores / cap) * cap if cap else scores
    # The weights are a softmax of the scores where they are seen: raising scores multiplies weights by exp.
    raised = torch.zeros_like(scores)
    raised[..., 1:4] += 2.0 * scores[..., 1:4].abs()
    raised[..., 3:5] += 5.0 * scores[..., 3:5].abs()
    new = weights * raised.exp()
    expected = new / new.sum(-1, keepdim=True) @ _values(model, inputs)
    after = _first_layer(model, inputs, AttentionBoost([(1, 4), slice(3, 5)], [2.0, 5.0])).heads[:, 0].double()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(after.movedim(1, 2)[real], expected.movedim(1, 2)[real], atol=2e-6, rtol=1e-4)


def _causal(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows)[None, None]


def test_sinks_are_columns_that_receive_more_than_their_share() -> None:
    weights = _causal([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.1, 0.8, 0.1, 0], [0.05, 0.85, 0.05, 0.05]])
    # Means over the queries that see a column: 0.5125, 0.5833, 0.075, 0.05; an even share is 0.25.
    assert find_sinks(weights, 2.0).tolist() == [[[True, True, False, False]]]
    assert find_sinks(weights, 2.2).tolist() == [[[False, True, False, False]]]
    mask = torch.tensor([[True, True, True, False]])
    assert find_sinks(weights, 1.3, mask).tolist() == [[[True, True, False, False]]]
    assert find_sinks(weights, 1.5, mask).tolist() == [[[True, False, False, False]]]


def test_calibration_moves_what_it_says() -> None:
    weights = _causal([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.1, 0.8, 0.1, 0], [0.05, 0.75, 0.15, 0.05]])
    action = AttentionCalibration(0.5, 2.0)
    new = action.reweigh(0, weights, Run(4))
    assert new is not None
    expected = _causal([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0.1, 0.4, 0.5, 0], [0.05, 0.375, 0.43125, 0.14375]])
    torch.testing.assert_close(new, expected)
    torch.testing.assert_close(new.sum(-1), torch.ones(1, 1, 4))


def test_calibration_uses_the_prompts_sinks_while_generating() -> None:
    action, run = AttentionCalibration(0.5, 2.0), Run(4)
    action.reweigh(1, _causal([[1.0, 0, 0], [0.1, 0.9, 0], [0.1, 0.8, 0.1]]), run)
    new = action.reweigh(1, _causal([[0.1, 0.6, 0.2, 0.1]]), run)
    torch.testing.assert_close(new, _causal([[0.1, 0.3, 0.4, 0.2]]))


def test_redistribution_moves_what_it_says() -> None:
    weights = _causal([[0.5, 0.1, 0.2, 0.1, 0.1], [0.9, 0.05, 0.02, 0.02, 0.01], [0.3, 0.0, 0.1, 0.5, 0.1]])
    sinks = torch.tensor([True, False, False, True, False])
    span = torch.tensor([False, True, True, True, False])
    new = redistribute(weights, sinks[None, None, None], span[None, None, None], 0.5, 0.7, 0.2)
    # Row 0: the span has 0.4, 0.3 of it on no sink; 0.5 * 0.6 is freed. Rows 1 (span 0.09) and 2 (share 1/6) stay.
    expected = _causal([[0.25, 0.2, 0.4, 0.05, 0.1], [0.9, 0.05, 0.02, 0.02, 0.01], [0.3, 0.0, 0.1, 0.5, 0.1]])
    torch.testing.assert_close(new, expected)


def test_the_last_layer_is_not_redistributed() -> None:
    model, inputs = polyhead.load(tiny("bert")), inputs_for("bert")
    only_last = RedistributeAttention((1, 4), range(32), 0.9, 0.0, 0.0, tau=2.3, heads=[(1, 0), (1, 1)])
    with torch.no_grad():
        plain = states(model, inputs)
        with only_last.on(model):
            assert torch.equal(states(model, inputs), plain)


def test_sink_dimensions_finds_the_massive_one(minilm_path: str) -> None:
    states_ = torch.ones(1, 3, 16)
    states_[0, 1, 5] = 100.0
    found = massiveness(states_, [2, 5])
    torch.testing.assert_close(found[0], torch.tensor([1.0, 100 / ((15 + 1e4) / 16) ** 0.5, 1.0]))
    model = polyhead.load(minilm_path)
    model.module.embeddings.word_embeddings.weight.data[101, 7] += 90.0  # the first token of each text
    model.module.encoder.layer[2].output.LayerNorm.bias.data[9] += 90.0  # every token: marks none
    assert sink_dimensions(model, ["a text", "and another, longer text"], 1) == [7]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_steps_with_a_cache_equal_the_whole_text(family: str) -> None:
    """Boost and redistribution see the same keys step by step as at once (within the sliding window)."""
    model = polyhead.load(tiny(family, **({"sliding_window": 16} if family == "gemma3" else {})))
    ids = torch.randint(3, 98, (1, 7), generator=torch.Generator().manual_seed(4))
    for name in ("boost", "redistribute", "temperature"):
        with torch.no_grad(), ACTIONS[name][1]().on(model):
            whole = states(model, {"input_ids": ids})
        with torch.no_grad(), ACTIONS[name][1]().on(model):
            start = model(input_ids=ids[:, :6], use_cache=True)
            step = model(input_ids=ids[:, 6:], past_key_values=start.past_key_values).last_hidden_state
        torch.testing.assert_close(step[:, 0], whole[:, -1], atol=1e-5, rtol=1e-4)


def test_spans() -> None:
    like = torch.zeros(2, 6)
    assert span_mask((1, 3), like).tolist() == [[False, True, True, False, False, False]]
    assert span_mask(slice(2), like).sum() == 2
    rows = torch.tensor([[True, False], [False, True]])
    assert span_mask(rows, like).nonzero().tolist() == [[0, 0], [1, 1]]
    with pytest.raises(InputError, match="ends at token 9"):
        span_mask((1, 9), like)
    with pytest.raises(InputError, match="ends at token None"):
        span_mask(slice(2, None), like)


def test_calibration_gain_skips_the_outer_layers() -> None:
    model = polyhead.load(tiny("bert", num_hidden_layers=5))
    inputs = inputs_for("bert")
    task = FunctionTask([Batch(inputs, {}, 2)], lambda out, batch: out.last_hidden_state[:, 0, 0])
    for by in ("head", "layer"):
        found = calibration_gain(model, task, beta=0.1, threshold=1.0, by=by).values
        assert torch.isnan(torch.tensor(found))[[0, 1, 4]].all()
        with AttentionCalibration(0.1, 1.0, [(3, 1)] if by == "head" else [(3, h) for h in range(4)]).on(model):
            changed = states(model, inputs)[:, 0, 0].mean() - 0.0
        expected = float(changed.detach() - states(model, inputs)[:, 0, 0].mean().detach())
        assert found[3, 1] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(InputError, match="by is 'model'"):
        calibration_gain(model, task, by="model")


def test_length_collapse_is_the_mean_cosine_of_pairs(minilm_path: str) -> None:
    from polyhead.act import length_collapse

    model = polyhead.load(minilm_path)
    long = ["a ship left the harbour at dawn", "tax law is dull but pays well", "one two three four five"]
    texts = [*long[:2], "too short", long[2]]
    found = length_collapse(model, texts, (4, 7), batch_size=2)
    pooled = []
    for text in long:  # the other has fewer than 7 tokens
        with torch.no_grad():
            pooled.append(states(model, model.tokenize([text], truncation=True, max_length=4)).mean(1)[0].double())
    pairs = [torch.cosine_similarity(pooled[i], pooled[j], 0).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert found[4] == pytest.approx(sum(pairs) / 3, abs=1e-5)
    with pytest.raises(InputError, match="at least 2 are needed"):
        length_collapse(model, texts, (200,))
