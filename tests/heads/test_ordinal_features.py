"""Features modulo ten: the definition, planted features that transfer, and a hand-built head steered by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from heads.by_hand_words import WORDS, next_word_model

from polyhead.errors import InputError
from polyhead.heads.ordinal_features import Mod10Features
from polyhead.heads.vocabulary import token_states

CLASSES = {"week": WORDS[:7], "numbers": WORDS[7:14]}


def test_features_are_means_of_what_is_left_of_a_class() -> None:
    model = next_word_model()
    found = Mod10Features(model, CLASSES).vectors.double()
    expected = torch.zeros(10, found.shape[1], dtype=torch.float64)
    for words in CLASSES.values():
        ids = [model.tokenizer(word)["input_ids"][0] for word in words]
        states = token_states(model, ids, "first-mlp").double()
        expected[1:8] += (states - states.mean(0)) / 2
    assert torch.allclose(found, expected, atol=1e-5)


def test_planted_features_transfer_and_random_ones_do_not() -> None:
    features = Mod10Features(next_word_model(), CLASSES)
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(7, 64, generator=generator)
    for name in CLASSES:
        features._states[name] = shared + torch.randn(64, generator=generator)
    found = features.transfer(shuffles=99)
    assert (found.share, found.p, found.words) == (1, 0.01, 14)
    assert found.null == pytest.approx(1 / 7, abs=0.06)
    for name in CLASSES:
        features._states[name] = torch.randn(7, 64, generator=generator)
    assert features.transfer(shuffles=99).p > 0.05


def test_a_hand_built_head_gives_the_successor_of_the_place_it_is_steered_to() -> None:
    features = Mod10Features(next_word_model(), CLASSES)
    # The states of the hand-built model are a direction a word, so the mean of two classes holds half of each.
    found = features.steer((1, 0), minus=2, plus=5, scale=2.0)
    assert (found.before, found.after, found.words) == (0, 1, 2)
    assert features.steer((1, 0), minus=2, plus=2).after == 1
    assert np.isnan(features.steer((1, 0), minus=2, plus=7).after)  # nothing follows the last word
    assert features.steer((1, 1), minus=2, plus=5, scale=2.0).after == 0


def test_refusals() -> None:
    with pytest.raises(InputError, match="need two"):
        Mod10Features(next_word_model(), {"week": WORDS[:7]})
    features = Mod10Features(next_word_model(), CLASSES)
    with pytest.raises(InputError, match="layer 1 to 1"):
        features.steer((0, 0), minus=1, plus=2)
    with pytest.raises(InputError, match="modulo ten"):
        features.steer((1, 0), minus=1, plus=12)
