"""Every supported family: heads found, parity of head outputs, attention equal to the model's own, nothing changed."""

from __future__ import annotations

import pytest
import torch
from tiny import FALLBACK, FAMILIES, inputs_for, tiny, tower_of

from polyhead.model import load


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    family = request.param
    return family, load(tiny(family), tower=tower_of(family)), inputs_for(family)


def test_heads_are_found(case):
    family, model, _ = case
    assert (model.layers, model.heads, model.head_dim) == (2, 4, 8)
    grouped = family in {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"}
    assert model.kv_heads == (2 if grouped else 1 if family == "falcon" else 4)
    assert [layer.uses_interface for layer in model.attention_layers] == [family not in FALLBACK] * 2


def test_recording_changes_nothing(case):
    _, model, inputs = case
    with torch.no_grad():
        before = model(**inputs)[0]
        with model.record("heads", "tokens", "attention"):
            during = model(**inputs)[0]
        after = model(**inputs)[0]
    torch.testing.assert_close(during, before, rtol=0, atol=1e-6)
    assert torch.equal(before, after)


def test_heads_sum_to_the_attention_output(case):
    _, model, inputs = case
    outputs = {}
    handles = [
        projection.register_forward_hook(lambda module, args, output: outputs.setdefault(id(module), []).append(output))
        for projection in {layer.output_projection for layer in model.attention_layers}
    ]
    with torch.no_grad(), model.record("heads") as recording:
        model(**inputs)
    for handle in handles:
        handle.remove()
    for layer in model.attention_layers:
        z = recording.layer_heads(layer.index).double()  # [batch, heads, tokens, head_dim]
        total = torch.einsum("bhtd,hdo->bto", z, model.output_weight(layer.index).double())
        bias = model.output_bias(layer.index)
        total = total if bias is None else total + bias.double()
        expected = outputs[id(layer.output_projection)][layer.call].double()
        torch.testing.assert_close(total, expected.reshape(total.shape), rtol=0, atol=1e-5)


def test_attention_equals_the_models_own(case):
    family, model, inputs = case
    with torch.no_grad(), model.record("attention") as recording:
        model(**inputs)
    part = load(tiny(family, attention="eager"), tower=tower_of(family)).module
    with torch.no_grad():
        expected = part(**inputs, output_attentions=True).attentions
    assert len(expected) == model.layers
    mask = inputs.get("attention_mask")
    rows = torch.ones(recording.attention.shape[0], recording.attention.shape[-2], dtype=torch.bool)
    rows = rows if mask is None else mask.bool()  # what a padded position attends to is nobody's business
    for layer, weights in enumerate(expected):
        got = recording.layer_attention(layer)
        assert got.shape == weights.shape
        torch.testing.assert_close(got.movedim(1, 2)[rows], weights.movedim(1, 2)[rows], rtol=0, atol=1e-5)


def test_tokens_stand_at_the_borders_of_the_layers(case):
    _, model, inputs = case
    with torch.no_grad(), model.record("tokens") as recording:
        result = model(**inputs, output_hidden_states=True)
    own = result.hidden_states
    assert recording.tokens.shape[1] == model.layers + 1
    for layer in range(model.layers):  # the last of the model's own may be after a final norm
        torch.testing.assert_close(recording.tokens[:, layer], own[layer], rtol=0, atol=1e-6)


def test_gradients_flow_through_a_recorded_head(case):
    _, model, inputs = case
    parameter = next(model.module.parameters())
    with model.record("heads") as recording:
        model(**inputs)
    recording.layer_heads(1)[:, 2].square().sum().backward()
    grads = [p.grad for p in model.module.parameters() if p.grad is not None]
    model.module.zero_grad()
    assert parameter.requires_grad
    assert any(grad.abs().sum() > 0 for grad in grads)
