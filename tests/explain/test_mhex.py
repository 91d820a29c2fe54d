"""Explaining branches: against their definition, on planted evidence, on tokens and on pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import nn

import polyhead
from polyhead.errors import InputError
from polyhead.explain.base import ClassReadout
from polyhead.explain.mhex import MHEX, MHEXBranch, MHEXReadout, MHEXSaliency, attach_mhex


def random_inputs(lengths: tuple[int, ...] = (4, 7, 9)) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 90, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[int(i < n) for i in range(max(lengths))] for n in lengths])
    return {"input_ids": ids, "attention_mask": mask}


def test_a_branch_and_its_equivalent_matrix_are_what_they_are_defined_to_be():
    torch.manual_seed(0)
    branch, states = MHEXBranch(6, 3).double(), torch.randn(2, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    gate, weight, bias = branch.gate.weight, branch.classifier.weight, branch.classifier.bias
    for row in range(2):
        places = [t for t in range(5) if mask[row, t]]
        gated = torch.stack([gate @ states[row, t] for t in places])
        torch.testing.assert_close(branch(states, mask)[row], weight @ gated.clamp(min=0).mean(0) + bias)
        for c in range(3):  # without the non-negativity, <E_c, x> is the logit
            evidence = branch.evidence(states, torch.tensor([c, c]))[row]
            logit = branch(states, mask, non_negative=False)[row, c]
            torch.testing.assert_close(evidence[mask[row]].mean() + bias[c], logit)
            torch.testing.assert_close(evidence[0], (weight @ gate)[c] @ states[row, 0])
    assert branch.saliency(states, torch.tensor([0, 1])).min() >= 0


@pytest.mark.parametrize("family", ["bert", "gemma3", "albert"])
def test_stages_are_the_blocks_outputs_and_nothing_stays_on_the_model(family):
    model = polyhead.load(tiny(family))
    mhex = attach_mhex(model, [0, -1], 3)
    inputs = random_inputs((9, 9))
    with model.record("tokens") as recording, torch.no_grad():
        expected = model(**inputs).last_hidden_state
    with torch.no_grad():
        first, last = mhex.features(inputs)
    torch.testing.assert_close(first.states, recording.tokens[:, 1].float())
    torch.testing.assert_close(last.states, recording.tokens[:, 2].float())
    assert not any(part._forward_hooks for part in model.module.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=0, atol=0)


def test_a_padded_batch_equals_one_by_one():
    mhex = attach_mhex(polyhead.load(tiny("bert")), [0, 1], 3)
    inputs = random_inputs()
    together = mhex.explain(inputs, 1)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = mhex.explain({"input_ids": inputs["input_ids"][row : row + 1, :length]}, 1)
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.merged[row, :length], alone.merged[0], atol=1e-5, rtol=1e-4)
        assert (together.merged[row, length:] == 0).all()


def test_half_precision():
    model = polyhead.load(tiny("llama"), dtype="bfloat16")
    found = attach_mhex(model, [1], 2).explain(random_inputs((6, 6)))
    assert found.logits.dtype == torch.float32
    assert found.merged.isfinite().all()


def test_the_token_that_decides_gets_the_saliency_and_the_model_is_left_alone():
    random = np.random.default_rng(0)
    ids = torch.tensor(random.integers(10, 90, (256, 8)))
    at, answers = torch.tensor(random.integers(0, 8, 256)), torch.tensor(random.integers(0, 2, 256))
    ids[torch.arange(256), at] = 5 + answers  # token 5 says class 0, token 6 class 1
    model = polyhead.load(tiny("bert"))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    mhex = attach_mhex(model, [0, 1], 2)
    batches = [({"input_ids": ids[i : i + 64]}, answers[i : i + 64]) for i in range(0, 192, 64)]
    mhex.fit(batches, epochs=80, rate=3e-3)
    found = mhex.explain({"input_ids": ids[192:]}, smooth=0)
    assert (found.classes == answers[192:]).float().mean() > 0.9
    assert (found.merged.argmax(-1) == at[192:]).float().mean() > 0.75  # chance 0.125
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    readout = MHEXReadout(model, mhex, ["first", "second"])
    judged = np.array([True] * 7 + [False])
    scores = MHEXSaliency(smooth=0).attribute(readout, ids[200], int(found.classes[8]), judged)
    np.testing.assert_allclose(scores[:7], found.merged[8, :7], rtol=1e-4, atol=1e-6)
    assert np.isnan(scores[7])
    assert readout.probabilities(ids[192:]).argmax(-1).equal(found.classes)


class Pixels(nn.Module):
    """Two stages: the image as it is, and the means of its quarters."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(1, 2, 1, bias=False), nn.AvgPool2d(2)
        self.fine.weight.data = torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1)

    def forward(self, images):
        return self.coarse(self.fine(images))


def test_pixel_maps_are_brought_to_the_finest_grid_smoothed_and_added():
    network, images = Pixels(), torch.zeros(1, 1, 4, 4)
    images[0, 0, 1, 2] = 4.0
    mhex = attach_mhex(network, ["fine", "coarse"], 1, example=images)
    for branch in mhex.branches:  # gate: identity; the class is the first channel: E = (1, 0)
        branch.gate.weight.data, branch.classifier.weight.data = torch.eye(2), torch.tensor([[1.0, 0.0]])
    found = mhex.explain(images, 0, smooth=0)
    assert found.stages[0].shape == (1, 4, 4)
    assert found.stages[1].tolist() == [[[0.0, 1.0], [0.0, 0.0]]]
    large = nn.functional.interpolate(found.stages[1][None], (4, 4), mode="bilinear")[0]
    torch.testing.assert_close(found.merged, images[0] + large)
    smoothed = mhex.explain(images, 0, smooth=0.5).merged - _spread(large)
    wanted = torch.zeros(4, 4)
    wanted[:3, 1:] = 4 * torch.tensor([[1 / 3, 0.5, 0.25]]).T * torch.tensor([[0.25, 0.5, 1 / 3]])
    torch.testing.assert_close(smoothed[0], wanted, atol=1e-5, rtol=1e-5)


def _spread(maps: torch.Tensor) -> torch.Tensor:
    """(1/4, 1/2, 1/4) along both axes; at the edge (2/3, 1/3)."""
    one = torch.diag(torch.full((4,), 0.5)) + torch.diag(torch.full((3,), 0.25), 1)
    one = one + torch.diag(torch.full((3,), 0.25), -1)
    one = one / one.sum(1, keepdim=True)
    return one @ maps @ one.T


def test_training_the_network_too_changes_it():
    torch.manual_seed(0)
    network = Pixels()
    images = torch.randn(32, 1, 4, 4)
    answers = (images.mean((1, 2, 3)) > 0).long()
    mhex = attach_mhex(network, ["fine", "coarse"], 2, example=images)
    before = network.fine.weight.clone()
    mhex.fit([(images, answers)], epochs=150, rate=0.02, train_model=True)
    assert (mhex.logits(images).argmax(-1) == answers).float().mean() > 0.9
    assert not torch.equal(before, network.fine.weight)
    assert not network.training


def test_refusals():
    model, network = polyhead.load(tiny("bert")), Pixels()
    with pytest.raises(InputError, match="No layers"):
        attach_mhex(model, [], 2)
    with pytest.raises(InputError, match="layers 0 to 1"):
        attach_mhex(model, [7], 2)
    with pytest.raises(InputError, match=r"unknown names: \['deep'\], example missing"):
        attach_mhex(network, ["deep"], 2)
    mhex = attach_mhex(model, [0], 2)
    with pytest.raises(InputError, match="nothing to learn"):
        mhex.fit([])
    with pytest.raises(InputError, match="between 0 and 1"):
        mhex.explain(random_inputs(), smooth=2.0)
    with pytest.raises(InputError, match="another model"):
        MHEXReadout(polyhead.load(tiny("bert")), mhex, ["a", "b"])
    plain = ClassReadout(model, torch.zeros(2, 32), torch.zeros(2), ["a", "b"])
    with pytest.raises(InputError, match="not ClassReadout"):
        MHEXSaliency().attribute(plain, torch.tensor([1, 2, 3]), 0)
    flat = nn.Sequential(nn.Flatten())
    with pytest.raises(InputError, match=r"gives \[1, 16\]"):
        MHEX(flat, [(flat[0], 0)], [2], 2).features(torch.zeros(1, 1, 4, 4))
