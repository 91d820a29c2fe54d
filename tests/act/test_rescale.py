"""Attention on a span multiplied a head: against the definition, undone after the block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import inputs_for, tiny

import polyhead
from polyhead.act.rescale import RescaleAttention
from polyhead.errors import InputError

FACTORS = np.array([[2.0, 1.0, -2.0, 0.5], [1.0, 1.0, 1.0, 1.0]])


@pytest.mark.parametrize("family", ["bert", "llama", "gemma3"])
def test_head_outputs_are_those_of_the_multiplied_weights(family):
    model, inputs = polyhead.load(tiny(family)), inputs_for(family)
    values = {}
    with torch.no_grad():
        plain = model(**inputs)[0]
        with model.record("attention") as recording:
            model(**inputs)
        with model.tap_attention(lambda layer, call: values.update({layer: call.value})):
            model(**inputs)
        with RescaleAttention((1, 3), FACTORS).on(model), model.record("heads") as acted:
            model(**inputs)
        weights = recording.layer_attention(0).double()
        for head, factor in enumerate(FACTORS[0]):
            row = weights[:, head].clone()
            row[..., 1:3] *= factor
            value = values[0][:, head // (4 // values[0].shape[1])].double()
            found = acted.layer_heads(0)[:, head].double()
            torch.testing.assert_close(found[:, :4], (row @ value)[:, :4], atol=1e-5, rtol=1e-4)  # the rest is padding
        torch.testing.assert_close(model(**inputs)[0], plain)


def test_ones_change_nothing_and_another_shape_is_refused():
    model, inputs = polyhead.load(tiny("bert")), inputs_for("bert")
    with torch.no_grad():
        plain = model(**inputs)[0]
        with RescaleAttention((1, 3), np.array([[1, np.nan, 1, 1]] * 2)).on(model):
            torch.testing.assert_close(model(**inputs)[0], plain, rtol=0, atol=0)
    with pytest.raises(InputError, match="one factor for each"):
        RescaleAttention((1, 3), np.ones((3, 4))).on(model)
