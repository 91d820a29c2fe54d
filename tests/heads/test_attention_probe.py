"""The attention probe: its loss against the definition, and relations it can and cannot learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from by_hand import copying_model
from test_attention_profile import with_numbers
from tiny import tiny

from polyhead.errors import InputError
from polyhead.heads.attention_probe import AttentionProbe, _joined, _loss
from polyhead.heads.relations import ParsedSentence


def chain(random: np.random.Generator, n: int) -> ParsedSentence:
    """Every word's head word is the one before it."""
    words = tuple(str(word) for word in random.permutation(np.arange(4, 28))[:n])
    return ParsedSentence(words, (-1, *range(n - 1)), ("root", *["chain"] * (n - 1)))


def test_the_loss_is_the_negative_log_likelihood():
    examples = [(torch.tensor([[1.0], [2.0], [0.5]]), 1), (torch.tensor([[3.0], [-700.0]]), 0)]
    features, target, owner = _joined(examples)
    found = _loss(features[:, 0].double(), target, owner)
    first = -2 + math.log(math.exp(1) + math.exp(2) + math.exp(0.5))
    assert found.item() == pytest.approx(first / 2, abs=1e-9)


def test_a_previous_token_head_is_weighed_most_and_parses_a_chain():
    model = with_numbers(copying_model())
    model.tokenizer.begin, model.tokenizer.end = 30, 31
    random = np.random.default_rng(0)
    train, test = [chain(random, 6) for _ in range(4)], [chain(random, 9) for _ in range(3)]
    probe = AttentionProbe().fit(model, train)
    assert probe.score(model, test) == 1.0
    assert np.abs(probe.weights_).argmax() == 0  # attention from the word, head 0 of layer 0


def test_refusals():
    model = with_numbers(tiny("bert"))
    one = ParsedSentence(("3", "4"), (1, -1), ("det", "root"))
    with pytest.raises(InputError, match="call fit"):
        AttentionProbe().score(model, [one])
    probe = AttentionProbe().fit(model, [one])
    with pytest.raises(InputError, match="fitted on 8 heads"):
        probe.score(with_numbers(copying_model()), [one])
    with pytest.raises(InputError, match="No pairs"):
        AttentionProbe().fit(model, [ParsedSentence(("3",), (-1,), ("root",))])
