"""Circuits of heads: the working heads are found, what joins them is right, faithfulness by its definition."""

from __future__ import annotations

import pytest
import torch
from tiny import inputs_for, tiny

from polyhead.errors import InputError
from polyhead.heads.cd_t import ContextualDecomposer
from polyhead.heads.head_circuit import CircuitSearch, faithfulness, mean_heads
from polyhead.model import load


@pytest.fixture(scope="module")
def two_heads():
    """GPT-2 in which only head 1 of layer 0 and head 3 of layer 1 give anything."""
    module = tiny("gpt2").double()
    for block, head in zip(module.h, (1, 3), strict=True):
        weight = block.attn.c_proj.weight.data
        weight[: 8 * head] = 0
        weight[8 * head + 8 :] = 0
        weight *= 30
    return load(module)


@pytest.fixture(scope="module")
def inputs():
    return {"input_ids": inputs_for("gpt2")["input_ids"][1:]}


def test_the_working_heads_are_the_circuit(two_heads, inputs):
    circuit = CircuitSearch(ContextualDecomposer(two_heads), keep=2, width=2).find(inputs)
    assert set(circuit.heads) == {(0, 1), (1, 3)}
    strengths = {edge[:2]: edge[2] for edge in circuit.edges}
    reach = ContextualDecomposer(two_heads).to_heads(inputs, (0, 1))
    assert strengths[(0, 1), (1, 3)] == reach[1, 3] > 0
    assert strengths[(0, 1), None] > 0


def test_the_asked_number_of_heads_is_kept_once_each(two_heads, inputs):
    circuit = CircuitSearch(ContextualDecomposer(two_heads), keep=7, width=1).find(inputs)
    assert len(set(circuit.heads)) == len(circuit.heads) == 7
    assert all(source[0] < target[0] for source, target, _ in circuit.edges if target)
    with pytest.raises(InputError, match="1 to 8"):
        CircuitSearch(ContextualDecomposer(two_heads), keep=9)


def test_faithfulness_follows_its_definition(two_heads, inputs):
    def measure(outputs):
        return outputs.last_hidden_state[:, -1, 0]

    assert faithfulness(two_heads, [(0, 1), (1, 3)], inputs, measure) == pytest.approx(1)
    assert faithfulness(two_heads, [(0, 0), (1, 2)], inputs, measure) == pytest.approx(0, abs=1e-9)
    means = mean_heads(two_heads, inputs)

    def run(kept):
        def ablate(layer, z):
            changed = means[layer].expand_as(z).clone()
            for head in kept.get(layer, []):
                changed[:, :, head] = z[:, :, head]
            return changed

        with two_heads.tap_heads(ablate), torch.no_grad():
            return measure(two_heads(**inputs)).mean()

    with torch.no_grad():
        whole = measure(two_heads(**inputs)).mean()
    expected = (run({1: [3]}) - run({})) / (whole - run({}))
    assert faithfulness(two_heads, [(1, 3)], inputs, measure) == pytest.approx(float(expected))
    assert abs(float(expected) - 1) > 0


def test_means_leave_padding_out():
    model, padded = load(tiny("bert").double()), inputs_for("bert")
    one = {key: value[:1] for key, value in padded.items()}
    alone = {"input_ids": padded["input_ids"][:1, :4]}
    torch.testing.assert_close(mean_heads(model, one), mean_heads(model, alone))
