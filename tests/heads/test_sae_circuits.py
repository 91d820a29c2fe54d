"""Codes of head outputs: counts by hand, a planted circuit, places and paddings; the model trained for tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import inputs_for, tiny

from polyhead.errors import InputError
from polyhead.heads.induction import recall, repeating, train_induction
from polyhead.heads.sae_circuits import (
    CircuitExamples,
    DiscreteSAECircuit,
    Roc,
    head_vectors,
    mean_difference,
)
from polyhead.model import load


def planted(members=((0, 1), (1, 2)), examples=8):
    """Outputs along one of 6 directions; heads in the circuit take one of 2 others on positives."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q[:8] * 4
    made = []
    for positive in (True, False):
        which = torch.randint(0, 3, (examples, 2, 4), generator=generator)
        for layer, head in members if positive else ():
            which[:, layer, head] = 6 + torch.arange(examples) % 2
        made.append(directions[which] + 0.01 * torch.randn(examples, 2, 4, 16, generator=generator))
    return made


def test_a_planted_circuit_is_found_with_its_pair():
    found = DiscreteSAECircuit(n_features=24, steps=200).fit(*planted())
    truth = np.zeros((2, 4), dtype=bool)
    truth[0, 1] = truth[1, 2] = True
    assert found.roc(truth).area == 1.0
    assert set(found.map.top(2)) == {(0, 1), (1, 2)}
    assert found.map.values.sum() == pytest.approx(1)
    assert set(found.circuit(found.map.values[0, 0] + 1e-9)) >= {(0, 1), (1, 2)}
    assert found.loss[-1] < 0.5 * found.loss[0]
    assert mean_difference(*planted())[truth].min() > mean_difference(*planted())[~truth].max()


@pytest.mark.parametrize("normalise", [False, True])
def test_counts_equal_the_definition(normalise):
    found = DiscreteSAECircuit(n_features=10, steps=5, normalise=normalise).fit(*planted())
    positive, negative = (codes.reshape(8, 8) for codes in (found.positive, found.negative))
    for a in range(8):
        mine, other = set(positive[:, a]), set(negative[:, a])
        expected = len(mine - other) / (len(mine | other) if normalise else 1)
        assert found.unique[divmod(a, 4)] == pytest.approx(expected)
        for b in range(8):
            first, second = (set(zip(codes[:, a], codes[:, b], strict=True)) for codes in (positive, negative))
            expected = 0 if a == b else len(first - second) / (len(first | second) if normalise else 1)
            assert found.pairs[(*divmod(a, 4), *divmod(b, 4))] == pytest.approx(expected)
    best = found.edges(4)
    assert [pair.score for pair in best] == sorted((pair.score for pair in best), reverse=True)
    assert all(pair.first < pair.second for pair in best)
    counted = np.zeros((2, 4))
    for pair in best:
        counted[pair.first] += 1
        counted[pair.second] += 1
    raised = np.exp(counted)
    assert np.allclose(found.by_pairs(4).values, raised / raised.sum())


def test_the_same_seed_gives_the_same_codes_and_a_head_of_zeros_one_code():
    positive, negative = planted()
    positive[:, 0, 3] = negative[:, 0, 3] = 0
    first, again = (DiscreteSAECircuit(n_features=10, steps=5).fit(positive, negative) for _ in range(2))
    assert (first.positive == again.positive).all()
    assert len(set(first.positive[:, 0, 3]) | set(first.negative[:, 0, 3])) == 1
    assert first.unique[0, 3] == 0


def test_the_area_by_hand_with_ties():
    scores = np.array([[3.0, 1.0], [1.0, 0.0]])
    truth = np.array([[True, True], [False, False]])
    assert Roc.of(scores, truth).area == pytest.approx(1 - 0.5 / 4)  # of four pairs one is a tie
    assert Roc.of(-scores, truth).area == pytest.approx(0.5 / 4)
    with pytest.raises(InputError, match="at least one"):
        Roc.of(scores, np.zeros((2, 2)))


@pytest.mark.parametrize("where", ["last", "mean"])
@pytest.mark.parametrize("family", ["bert", "gemma3"])
def test_vectors_are_what_heads_add_and_padding_is_left_out(family, where):
    model, inputs = load(tiny(family)), inputs_for(family)
    found = head_vectors(model, inputs, where)
    for row, length in ((0, 4), (1, 7)):
        alone = {"input_ids": inputs["input_ids"][row : row + 1, :length]}
        with model.record("heads") as recording, torch.no_grad():
            model(**alone)
        z = recording.heads[0, 1, 2]
        read = z[-1] if where == "last" else z.mean(0)
        torch.testing.assert_close(found[row, 1, 2], read @ model.output_weight(1)[2], rtol=1e-4, atol=1e-6)


def test_score_is_a_map_and_wrong_data_is_refused():
    model, inputs = load(tiny("llama"), dtype="bfloat16"), inputs_for("llama")
    other = {**inputs, "input_ids": inputs["input_ids"].flip(1)}
    found = DiscreteSAECircuit(steps=3).score(model, CircuitExamples(inputs, other))
    assert found.shape == (2, 4)
    assert found.values.sum() == pytest.approx(1)
    with pytest.raises(InputError, match="CircuitExamples"):
        DiscreteSAECircuit().score(model, ["a text"])
    with pytest.raises(InputError, match="'last' or 'mean'"):
        head_vectors(model, inputs, "first")
    with pytest.raises(InputError, match="one example"):
        DiscreteSAECircuit().fit(torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 3, 8))
    with pytest.raises(InputError, match="are 0"):
        DiscreteSAECircuit().fit(torch.zeros(2, 2, 4, 8), torch.zeros(2, 2, 4, 8))


def test_the_small_model_learns_and_its_sequences_repeat():
    generator = torch.Generator().manual_seed(3)
    ids, periods = repeating(16, generator=generator)
    for row, period in zip(ids, periods.tolist(), strict=True):
        assert 6 <= period < 26
        assert torch.equal(row[period:], row[:-period])
    before, after = train_induction(0, steps=1), train_induction(0, steps=40)
    looks = []
    for model in (before, after):
        with model.record("attention") as recording, torch.no_grad():
            model(input_ids=ids)
        looks.append(float(recording.attention[:, 0, 0].diagonal(offset=-1, dim1=-2, dim2=-1).mean()))
    assert min(looks) > 0.8  # layer 0 head 0 looks at the token before
    assert recall(after, ids, periods).mean() < recall(before, ids, periods).mean() - 0.2
    assert not any(
        parameter.abs().max() for block in after.module.transformer.h for parameter in block.mlp.parameters()
    )
    with pytest.raises(InputError, match="steps=0"):
        train_induction(steps=0)
