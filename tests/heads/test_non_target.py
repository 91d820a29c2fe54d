"""Output heads on another task's inputs: recall by definition, planted heads, chance, and what hiding tokens does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import nn

from polyhead.errors import InputError
from polyhead.heads.non_target import (
    PooledHead,
    SharedEncoder,
    Supervision,
    TaggingHead,
    intervene,
    non_target,
)


class Numbers(nn.Module):
    """An encoder made by hand: the state of a token is its own number; what is hidden counts 0."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, input_ids, attention_mask=None):
        self.calls += 1
        seen = input_ids if attention_mask is None else input_ids * attention_mask
        return seen[..., None].double()


class Sum(nn.Module):
    """Answers with the sum of all numbers, as a class."""

    def forward(self, states, mask):
        return nn.functional.one_hot((states[..., 0] * mask).sum(1).long(), 100).double()


def by_hand() -> SharedEncoder:
    tags = TaggingHead(1).double()
    tags.weight.weight.data.fill_(2.0)
    return SharedEncoder(Numbers(), {"tags": tags, "sum": Sum()})


def test_recall_is_the_share_of_gold_among_the_k_highest_candidates():
    random = np.random.default_rng(0)
    ids = torch.tensor(random.permuted(np.tile(np.arange(1, 13), (70, 1)), axis=1))
    gold = torch.tensor(random.random(ids.shape) < 0.3)
    gold[:, 0] = True
    candidates = torch.tensor(random.random(ids.shape) < 0.7)
    candidates[:, :3] = True
    found = non_target(by_hand(), {"input_ids": ids}, "tags", gold, candidates=lambda inputs: candidates, k=3)
    wanted = []
    for row, right, allowed in zip(ids.tolist(), gold.tolist(), candidates.tolist(), strict=True):
        best = sorted((i for i in range(12) if allowed[i]), key=lambda i: -row[i])[:3]
        wanted.append(sum(right[i] for i in best) / sum(right))
    np.testing.assert_allclose(found.examples["head"], wanted, atol=1e-12)
    assert found.recall["head"].value == pytest.approx(np.mean(wanted))
    assert found.chance == pytest.approx((3 / candidates.sum(1)).mean().item())


def test_a_planted_head_beats_random_ones_and_an_encoder_trained_apart():
    ids = torch.tensor([[1, 9, 2, 8], [7, 3, 9, 1]] * 20)
    other = by_hand()
    other.heads["tags"].weight.weight.data.neg_()  # it finds the smallest
    found = non_target(by_hand(), {"input_ids": ids}, "tags", ids > 6, against={"apart": other})
    assert (found.recall["head"].value, found.recall["apart"].value) == (1.0, 0.0)
    assert 0 < found.recall["random head"].value < 1  # heads of either sign
    assert found.gain("apart").low == 1.0
    assert "apart       0.00 [0.00, 0.00]" in str(found)


def test_padding_is_never_picked_and_a_padded_batch_equals_one_by_one():
    encoder = tiny("bert")
    shared = SharedEncoder(encoder, {"tags": TaggingHead(32), "topic": PooledHead(32, 3)}).eval()
    ids = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[1, 7:] = 0
    with torch.no_grad():
        together = shared({"input_ids": ids, "attention_mask": mask})
        for row, length in enumerate((4, 7, 9)):
            alone = shared({"input_ids": ids[row : row + 1, :length]})
            torch.testing.assert_close(together["topic"][row], alone["topic"][0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(together["tags"][row, :length], alone["tags"][0], atol=1e-5, rtol=1e-5)
    gold = torch.zeros_like(ids, dtype=torch.bool)
    gold[:, 0] = True
    found = non_target(shared, {"input_ids": ids, "attention_mask": mask}, "tags", gold, k=4)
    assert found.examples["head"][0] == 1.0  # four real tokens, four picks
    with pytest.raises(InputError, match="4 candidate tokens; at least 5"):
        non_target(shared, {"input_ids": ids, "attention_mask": mask}, "tags", gold, k=5)


def test_hiding_what_is_picked_changes_the_answer_and_hiding_zeros_does_not():
    ids = torch.tensor([[0, 5, 0, 4, 0], [3, 0, 0, 0, 9]] * 10)
    found = intervene(by_hand(), {"input_ids": ids}, "tags", "sum")
    assert (found.picked, found.others, found.gain.low) == (1.0, 0.0, 1.0)
    with pytest.raises(InputError, match="gives no classes"):
        intervene(by_hand(), {"input_ids": ids}, "tags", "tags")


def test_each_task_trains_its_own_head_alone_and_the_encoder_runs_once_for_all_heads():
    encoder = Numbers()
    shared = SharedEncoder(encoder, {"tags": TaggingHead(1).double(), "other": TaggingHead(1).double()})
    before = {name: value.clone() for name, value in shared.state_dict().items()}

    def draw(random):
        ids = torch.tensor(random.integers(-3, 4, (16, 5)))
        return {"input_ids": ids}, (ids > 0).double()

    shared.fit([Supervision("tags", draw, nn.functional.binary_cross_entropy_with_logits)], steps=200, rate=0.05)
    inputs, gold = draw(np.random.default_rng(5))
    encoder.calls = 0
    answers = shared(inputs)
    assert encoder.calls == 1
    assert ((answers["tags"] > 0) == gold.bool()).all()
    assert not shared.training
    assert torch.equal(shared.state_dict()["heads.other.weight.weight"], before["heads.other.weight.weight"])


def test_refusals():
    shared, ids = by_hand(), torch.tensor([[1, 2, 3]])
    with pytest.raises(InputError, match="No output head 'spans': this model has tags, sum"):
        shared({"input_ids": ids}, "spans")
    with pytest.raises(InputError, match="at least one"):
        SharedEncoder(Numbers(), {})
    with pytest.raises(InputError, match="expected a number a token"):
        non_target(shared, {"input_ids": ids}, "sum", ids > 1)
    with pytest.raises(InputError, match="gold tokens in 0 examples"):
        non_target(shared, {"input_ids": ids}, "tags", ids > 5)
    fixed = SharedEncoder(Numbers(), {"tags": nn.Module()})
    fixed.heads["tags"].forward = lambda states, mask: states[..., 0]
    with pytest.raises(InputError, match="no random head"):
        non_target(fixed, {"input_ids": ids}, "tags", ids > 1)
