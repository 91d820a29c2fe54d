"""Learned gates: their distribution against its definition, and what training does to them."""

from __future__ import annotations

import math

import torch
from tiny import inputs_for, tiny

import polyhead
from polyhead.act import Gate, LearnedGates


def test_penalty_is_the_probability_that_a_sampled_gate_is_open() -> None:
    torch.manual_seed(0)
    gates = LearnedGates(1, 20_000, start=-0.4)
    opened = float((gates() > 0).double().mean())
    expected = 1 / (1 + math.exp(-(-0.4 - 2 / 3 * math.log(0.1 / 1.1))))
    assert abs(float(gates.penalty().detach()) - expected) < 1e-6
    assert abs(opened - expected) < 0.01


def test_samples_reach_both_ends_and_evaluation_is_fixed() -> None:
    torch.manual_seed(0)
    gates = LearnedGates(1, 2_000, start=0.0)
    sample = gates()
    assert float(sample.min()) == 0.0
    assert float(sample.max()) == 1.0
    assert not torch.equal(sample, gates())
    gates.eval()
    assert torch.equal(gates(), gates())
    torch.testing.assert_close(gates(), torch.full((1, 2_000), 0.5))


def test_training_closes_the_heads_a_loss_does_not_need() -> None:
    torch.manual_seed(0)
    model, inputs = polyhead.load(tiny("bert")), inputs_for("bert")
    keep = torch.zeros(2, 4)
    keep[0, 1] = keep[1, 2] = 1.0
    with torch.no_grad(), Gate(keep).on(model):
        target = model(**inputs).last_hidden_state
    gates = LearnedGates.for_model(model, "sigmoid", start=0.0)
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.3)
    for _ in range(60):
        with gates.on(model):
            loss = (model(**inputs).last_hidden_state - target).pow(2).mean() * 1e3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(gates.harden().gates, keep.double())
    assert sorted(gates.headmap().top(2)) == [(0, 1), (1, 2)]
