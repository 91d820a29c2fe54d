"""One channel of one head: the action equals the edit of the weights."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from tiny import inputs_for, tiny

from polyhead.act.channel import ChannelSteer, laundry_list
from polyhead.act.gate import Gate
from polyhead.errors import InputError
from polyhead.heads.composition import channels
from polyhead.heads.weights import read_weights
from polyhead.model import load


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scaling_a_channel_is_the_edit_of_the_output_projection(family):
    module = tiny(family)
    model, inputs = load(module), inputs_for(family)
    direction = channels(read_weights(model).layers[0], 2).writes[1]
    edited = copy.deepcopy(module)
    projection = load(edited).attention_layers[0].output_projection
    rows = projection.weight.data if family == "gpt2" else projection.weight.data.T
    rows[16:24] += (0.3 - 1) * torch.outer(rows[16:24] @ direction, direction)
    with torch.no_grad():
        expected, plain = edited(**inputs).last_hidden_state, module(**inputs).last_hidden_state
        with ChannelSteer(0, 2, 1, scale=0.3).on(model):
            acted = model(**inputs).last_hidden_state
        after = model(**inputs).last_hidden_state
    assert torch.allclose(acted, expected, atol=1e-5)
    assert not torch.allclose(acted, plain, atol=1e-5)
    assert torch.equal(after, plain)


def _keep(seen: list, out: torch.Tensor) -> None:
    if out.shape[1] == 7:  # the model's own run, not the probe that reads the weights
        seen.append(out)


def test_driving_a_channel_adds_its_direction_to_what_the_layer_writes():
    model, inputs, seen = load(tiny("llama")), inputs_for("llama"), []
    direction = channels(read_weights(model).layers[1], 0).writes[0]
    projection = model.attention_layers[1].output_projection
    handle = projection.register_forward_hook(lambda _, args, out: _keep(seen, out))
    with torch.no_grad():
        model(**inputs)
        with ChannelSteer(1, 0, 0, add=2.5).on(model):
            model(**inputs)
    handle.remove()
    assert torch.allclose(seen[1] - seen[0], (2.5 * direction).expand_as(seen[0]), atol=1e-4)


def test_all_channels_silenced_is_the_head_gated_off():
    model, inputs = load(tiny("llama")), inputs_for("llama")
    with torch.no_grad(), Gate.off([(0, 3)], model).on(model):
        expected = model(**inputs).last_hidden_state
    with torch.no_grad(), ExitStack() as stack:
        for channel in range(8):
            stack.enter_context(ChannelSteer(0, 3, channel, scale=0).on(model))
        acted = model(**inputs).last_hidden_state
    assert torch.allclose(acted, expected, atol=1e-5)


def test_a_channel_that_is_not_there_is_refused():
    model = load(tiny("llama"))
    for wrong in ((2, 0, 0), (0, 4, 0), (0, 0, 8)):
        with pytest.raises(InputError, match="2 layers x 4 heads with 8 channels"), ChannelSteer(*wrong).on(model):
            pass


def test_laundry_lists_ask_for_each_place_equally_often():
    lists = laundry_list(4, 12, seed=1)
    assert [one.items.index(one.answer) for one in lists] == [0, 1, 2, 3] * 3
    assert all(one.prompt.count(one.answer) == 1 for one in lists)
    with pytest.raises(InputError, match="2 to 12"):
        laundry_list(13, 1)
