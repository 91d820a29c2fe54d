"""One threshold: against a search over all of them, and vectors of two networks in one triplet loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from polyhead.errors import InputError
from polyhead.objectives import CosineSimilarity, EmbeddingVerifier, Objective, Relation, TripletLoss


def pairs(n=200):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(n, 4, generator=generator)
    same = torch.rand(n, generator=generator) < 0.5
    second = torch.where(same[:, None], first, torch.randn(n, 4, generator=generator))
    return first, second + 0.6 * torch.randn(n, 4, generator=generator), same


def test_the_threshold_is_the_best_there_is():
    first, second, same = pairs()
    verifier = EmbeddingVerifier(CosineSimilarity()).fit(first, second, same)
    scores = nn.functional.cosine_similarity(first, second).double().numpy()
    truth = same.numpy()
    best = max(((scores > limit) == truth).mean() for limit in np.append(scores, -2.0))
    assert ((scores > verifier.threshold_) == truth).mean() == best
    assert np.array_equal(verifier.predict(first, second), scores > verifier.threshold_)
    assert 0.7 < verifier.accuracy_ <= best
    assert verifier.fold_accuracy_.shape == (10,)


def test_acceptance_at_a_rate_of_false_ones():
    first, second, same = pairs()
    verifier = EmbeddingVerifier(CosineSimilarity())
    scores, truth = nn.functional.cosine_similarity(first, second), same
    expected = 0.0
    for limit in scores:
        if (scores[~truth] > limit).double().mean() <= 0.05:
            expected = max(expected, float((scores[truth] > limit).double().mean()))
    assert abs(verifier.val_at_far(first, second, same, far=0.05) - expected) < 1e-9


def test_ties_and_wrong_marks():
    first = torch.eye(2).repeat(3, 1)
    same = torch.tensor([True, True, True, False, False, False])
    verifier = EmbeddingVerifier(folds=2).fit(first, first, same)  # all alike: no threshold can do better than half
    assert (verifier.predict(first, first) == same.numpy()).mean() == 0.5
    with pytest.raises(InputError, match="some same and some not"):
        verifier.fit(first, first, torch.ones(6))
    with pytest.raises(InputError, match="folds is 7"):
        EmbeddingVerifier(folds=7).fit(first, first, same)


def test_harmonic_triplets_pull_a_new_network_to_an_old_one():
    """Anchors of the new network, positives and negatives of the old one, frozen: both versions can be compared."""
    torch.manual_seed(0)
    x, labels = torch.randn(40, 6), torch.arange(8).repeat(5)
    x = x * 0.2 + torch.randn(8, 6)[labels]
    old, new = nn.Linear(6, 4), nn.Linear(6, 4)
    objective = Objective(TripletLoss())
    relation = Relation.from_labels(labels, labels)
    before = objective(new(x), relation, old(x).detach())
    optimizer = torch.optim.Adam(new.parameters(), lr=0.05)
    for _ in range(60):
        loss = objective(new(x), relation, old(x).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * before
    assert old.weight.grad is None
