"""Actions on a vision-language model: they reach the language tower's heads, and the image's tokens alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch
import transformers
from tiny import GROUPED, IMAGE

import polyhead
from polyhead.act import Action, AttentionBoost, RedistributeAttention, Reinforce, sink_dimensions
from polyhead.errors import InputError
from polyhead.heads.context import ContextAttention, ContextDivergence
from polyhead.model import HeadedModel
from polyhead.tap import AttentionCall, attention_weights

SPAN, IMAGE_ID = (1, 17), 98


@pytest.fixture(scope="module")
def model() -> HeadedModel:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**IMAGE),
        text_config=transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 3}, initializer_range=0.3),
        image_token_index=IMAGE_ID,
        vision_feature_layer=-1,
    )
    return polyhead.load(transformers.LlavaForConditionalGeneration(config).eval())


@pytest.fixture(scope="module")
def given() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, 22), generator=generator)
    ids[:, SPAN[0] : SPAN[1]] = IMAGE_ID
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}


def text_only(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = given["input_ids"]
    return {"input_ids": torch.cat([ids[:, : SPAN[0]], ids[:, SPAN[1] :]], 1)}


def first_layer(model: HeadedModel, given: dict[str, torch.Tensor], action: Action) -> tuple[torch.Tensor, ...]:
    """Layer 0's attention weights and values without the action, and its head outputs with it."""
    seen: list[torch.Tensor] = []

    def watch(_: int, call: AttentionCall) -> None:
        value = call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], 1)
        seen.extend([attention_weights(call), value, call.output.transpose(1, 2)])

    with torch.no_grad(), model.tap_attention(watch, layers=[0]):
        model(**given)
    with torch.no_grad(), action.on(model), model.tap_attention(watch, layers=[0]):
        model(**given)
    return seen[0], seen[1], seen[5]


def test_the_language_tower_is_what_is_tapped(model, given) -> None:
    assert (model.layers, model.heads, model.kv_heads) == (3, 4, 2)
    assert all("language_model" in layer.path for layer in model.attention_layers)
    kernels = [part.config._attn_implementation for part in (model.module.model.vision_tower, model.module.model)]
    with model.record("heads", "tokens", "attention") as seen, torch.no_grad():
        plain = model(**given).logits
    assert seen.heads.shape == (2, 3, 4, 22, 8)
    assert seen.tokens.shape == (2, 4, 22, 32)
    assert seen.attention.shape == (2, 3, 4, 22, 22)
    weight = torch.stack([model.output_weight(layer) for layer in range(3)])
    written = torch.einsum("blhtd,lhdo->blto", seen.heads, weight)
    x = seen.tokens[:, 0] + written[:, 0]
    layer = model.module.model.language_model.layers[0]
    with torch.no_grad():
        torch.testing.assert_close(x + layer.mlp(layer.post_attention_layernorm(x)), seen.tokens[:, 1])
        assert torch.equal(model(**given).logits, plain)
    after = [part.config._attn_implementation for part in (model.module.model.vision_tower, model.module.model)]
    assert after == kernels


ACTIONS: dict[str, Callable[[HeadedModel, dict], Action]] = {
    "boost": lambda model, given: AttentionBoost([SPAN], [1.0], [(0, 1), (1, 2)]),
    "redistribute": lambda model, given: RedistributeAttention(SPAN, range(32), 0.9, 0, 0, 2.6, [(0, 1), (1, 2)]),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_rows_sum_to_one_and_only_image_tokens_gain_in_chosen_heads(model, given, name) -> None:
    action = ACTIONS[name](model, given)
    weights, value, after = first_layer(model, given, action)
    first, end = SPAN
    untouched = [0, 2, 3]
    torch.testing.assert_close(after[:, untouched], (weights @ value)[:, untouched], atol=1e-5, rtol=1e-4)
    # A value of 1 in every feature of image tokens and 0 elsewhere reads the span's attention off the output.
    seen: list[torch.Tensor] = []

    def ones(layer: int, call: AttentionCall) -> AttentionCall:
        value = torch.zeros_like(call.value)
        value[:, :, first:end] = 1
        value[:, :, :, -1] = 1  # the last feature: the whole row's sum
        return AttentionCall(call.module, call.query, call.key, value, call.mask, call.kwargs, call.output)

    for on in (False, True):
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(model.tap_attention(prepare=ones, layers=[0]))
            if on:
                stack.enter_context(action.on(model))
            stack.enter_context(model.tap_attention(lambda _, call: seen.append(call.output), layers=[0]))
            model(**given)
    before, now = seen
    torch.testing.assert_close(now[..., -1], torch.ones_like(now[..., -1]), atol=1e-5, rtol=1e-5)
    gain = (now - before)[:, end:, :, 0]
    assert (gain[:, :, 1] > 1e-4).any()
    assert torch.allclose(gain[:, :, untouched], torch.zeros(1), atol=1e-6)
    if name == "boost":  # each image token's score rises, so the span cannot lose; text tokens keep their proportions
        assert (gain[:, :, 1] > 0).all()
    # Tokens before the image see none of it, and text without an image is a span beyond the input.
    assert torch.equal(before[:, 0, :, 0], now[:, 0, :, 0])
    with torch.no_grad(), pytest.raises(InputError, match="span ends"), action.on(model):
        model(**text_only(given))


def test_redistribution_takes_from_sinks_and_gives_to_the_images_other_tokens(model, given) -> None:
    dimensions = sink_dimensions(model, given)
    action = RedistributeAttention(SPAN, dimensions, 0.7, 0.0, 0.0, tau=1.5, heads=[(1, 0)])
    with model.record("tokens", "attention") as seen, torch.no_grad():
        model(**given)
    sinks = action.sinks(seen.tokens[:, 1])
    image = torch.zeros(22, dtype=torch.bool)
    image[SPAN[0] : SPAN[1]] = True
    assert 0 < int(sinks.sum()) < sinks.numel()
    weights = seen.attention[:, 1, 0].double()
    expected = weights.clone()
    for row in range(2):
        for query in range(22):
            takers = weights[row, query] * (image & ~sinks[row])
            if takers.sum() > 0:
                freed = 0.7 * weights[row, query] * sinks[row]
                expected[row, query] += takers / takers.sum() * freed.sum() - freed
    calls: list[torch.Tensor] = []
    values = model.tap_attention(lambda _, call: calls.append(call.value[:, 0]), layers=[1])
    with torch.no_grad(), action.on(model), model.record("heads") as acted, values:
        model(**given)
    torch.testing.assert_close(acted.heads[:, 1, 0].double(), expected @ calls[0].double(), atol=1e-5, rtol=1e-4)


def test_reinforcement_by_the_image_scales_the_last_token_of_responsive_heads(model, given) -> None:
    with model.record("heads") as without, torch.no_grad():
        model(**text_only(given))
    with model.record("heads") as plain, torch.no_grad():
        model(**given)
    seen: dict[int, torch.Tensor] = {}
    look = model.tap_heads(lambda layer, z: seen.update({layer: z.movedim(1, 2)}))
    with torch.no_grad(), Reinforce(without, 3.0).on(model), look:
        model(**given)
    first = plain.heads[:, 0].double()
    distance = (first[:, :, -1] - without.heads[:, 0, :, -1].double()).norm(dim=-1)
    for row in range(2):
        mean, std = distance[row].mean(), distance[row].std(unbiased=False)
        for head in range(4):
            chosen = distance[row].quantile(0.5) < distance[row, head] <= mean + std
            factor = 3.0 if chosen else 1.0
            torch.testing.assert_close(seen[0][row, head, -1].double(), factor * first[row, head, -1])
    torch.testing.assert_close(seen[0][:, :, :-1].double(), first[:, :, :-1])
    with torch.no_grad(), model.record("heads") as after:
        model(**given)
    assert torch.equal(after.heads, plain.heads)


def test_scores_of_a_context_that_is_an_image(model, given) -> None:
    found = ContextDivergence().score(model, [(given, text_only(given))]).values
    share = ContextAttention().score(model, [(given, SPAN)]).values
    with model.record("heads", "attention") as one, torch.no_grad():
        model(**given)
    with model.record("heads") as other, torch.no_grad():
        model(**text_only(given))
    distance = (one.heads[..., -1, :].double() - other.heads[..., -1, :].double()).norm(dim=-1).mean(0)
    torch.testing.assert_close(torch.tensor(found), distance, atol=1e-5, rtol=1e-5)
    expected = one.attention[..., -1, SPAN[0] : SPAN[1]].double().sum(-1).mean(0)
    torch.testing.assert_close(torch.tensor(share), expected, atol=1e-5, rtol=1e-5)
