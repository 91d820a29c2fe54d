"""Faithfulness of token scores against the definitions, and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyhead.errors import InputError
from polyhead.explain.base import Attribution
from polyhead.explain.faithfulness import (
    average_drop,
    deletion_curve,
    hellinger,
    insertion_curve,
    soft_comprehensiveness,
    soft_sufficiency,
    strengths,
)

WORTH = torch.tensor([0.1, 0.5, 0.0, 0.3], dtype=torch.float64)
IDS = torch.tensor([7, 8, 9, 6])


def _probability(ids: torch.Tensor) -> torch.Tensor:
    """The answer is the summed worth of the tokens that are not 0."""
    return (ids != 0).double() @ WORTH


def test_curves_of_an_additive_answer() -> None:
    down = deletion_curve(_probability, IDS, WORTH.numpy(), 0)
    assert down.fractions.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert down.probabilities == pytest.approx([0.9, 0.4, 0.1, 0, 0])
    assert down.auc == pytest.approx(0.25 * (0.45 + 0.4 + 0.1 + 0 + 0))
    up = insertion_curve(_probability, IDS, WORTH.numpy(), 0)
    assert up.probabilities == pytest.approx([0, 0.5, 0.8, 0.9, 0.9])
    worst = -WORTH.numpy()
    assert deletion_curve(_probability, IDS, worst, 0).auc > down.auc
    assert insertion_curve(_probability, IDS, worst, 0).auc < up.auc


def test_tokens_without_a_score_stay() -> None:
    scores = np.array([np.nan, 0.5, 0.0, 0.3])
    assert deletion_curve(_probability, IDS, scores, 0).probabilities[-1] == pytest.approx(0.1)
    assert insertion_curve(_probability, IDS, scores, 0).probabilities[0] == pytest.approx(0.1)
    assert average_drop(_probability, IDS, scores, 0, keep=1 / 3) == pytest.approx(0.3 / 0.9)


def test_fewer_points_and_replacements_of_each_token() -> None:
    others = torch.tensor([1, 0, 1, 1])  # only the second takes anything away
    curve = deletion_curve(_probability, IDS, WORTH.numpy(), others, points=3)
    assert curve.fractions.tolist() == [0, 0.5, 1]
    assert curve.probabilities == pytest.approx([0.9, 0.4, 0.4])


def test_average_drop_over_texts() -> None:
    rows, scores = torch.stack([IDS, IDS]), np.stack([WORTH.numpy(), -WORTH.numpy()])
    # Half kept: the best two leave 0.8 of 0.9; the worst two leave 0.1.
    assert average_drop(_probability, rows, scores, 0) == pytest.approx((0.1 / 0.9 + 0.8 / 0.9) / 2)

    def lower(ids: torch.Tensor) -> torch.Tensor:
        return 1 - _probability(ids)

    assert average_drop(lower, IDS, WORTH.numpy(), 0) == 0  # a gain is no drop


def test_hellinger_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    assert float(hellinger(p, q)) == pytest.approx(np.sqrt(0.5))
    assert float(hellinger(torch.tensor([1.0, 0]), torch.tensor([0, 1.0]))) == pytest.approx(1)


def _predict(states: torch.Tensor) -> torch.Tensor:
    """Probability of class 0 grows with the summed states, token by token weighed."""
    left = (states.double().mean(-1) * WORTH).sum(-1)
    return torch.stack([left, 1 - left], -1)


def test_soft_metrics_are_the_definition() -> None:
    states, scores = torch.ones(4, 6), np.array([0.2, 1.0, 0.0, 0.6])
    p, empty = np.array([0.9, 0.1]), np.array([0.0, 1.0])
    generator = torch.Generator().manual_seed(3)
    draws = torch.rand(5, 4, 6, generator=generator, dtype=torch.float64).numpy()

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(np.sqrt(a) - np.sqrt(b)) / np.sqrt(2))

    nothing = distance(p, empty)
    keep, lose = [], []
    for draw in draws:
        for found, chance in ((keep, scores), (lose, 1 - scores)):
            left = float(((draw < chance[:, None]).mean(-1) * WORTH.numpy()).sum())
            found.append(distance(p, np.array([left, 1 - left])))
    expected_nc = np.mean(lose) / nothing
    expected_ns = np.mean([max(0, (1 - d) - (1 - nothing)) for d in keep]) / nothing
    options = {"samples": 5, "seed": 3}
    assert soft_comprehensiveness(_predict, states, scores, **options) == pytest.approx(expected_nc)
    assert soft_sufficiency(_predict, states, scores, **options) == pytest.approx(expected_ns)


def test_soft_metrics_prefer_the_true_scores() -> None:
    states, true = torch.ones(4, 64), WORTH.numpy()
    for target in (None, 0):
        for metric in (soft_comprehensiveness, soft_sufficiency):
            good = metric(_predict, states, true, target=target, scale="rank")
            assert good > metric(_predict, states, -true, target=target, scale="rank") + 0.2
            assert 0 <= good <= 1 + 1e-9


def test_soft_metrics_leave_unjudged_tokens_whole() -> None:
    states, scores = torch.ones(4, 8), np.array([np.nan, 1.0, 1.0, 1.0])
    # All judged tokens have strength 1 (unscaled): nothing is left of them, and that is what S0 is.
    assert soft_comprehensiveness(_predict, states, scores, scale="none") == pytest.approx(1)
    assert soft_sufficiency(_predict, states, scores, scale="none") == pytest.approx(1)
    assert soft_comprehensiveness(_predict, states, scores, target=0, scale="none") == pytest.approx(1)


def test_strengths() -> None:
    scores = np.array([3.0, np.nan, 1.0, 2.0])
    assert strengths(scores)[[0, 2, 3]].tolist() == [1, 0, 0.5]
    assert strengths(scores, "rank")[[0, 2, 3]] == pytest.approx([5 / 6, 1 / 6, 0.5])
    assert np.isnan(strengths(scores)[1])
    assert strengths(np.ones(3)).tolist() == [0.5] * 3
    with pytest.raises(InputError, match="between 0 and 1"):
        strengths(scores, "none")


def test_an_attribution_ranks_and_joins_words() -> None:
    found = Attribution(["<s>", " un", "like", "ly", "!"], [np.nan, 0.2, 0.3, 0.2, 0.3])
    assert found.top(9) == [2, 4, 1, 3]
    assert (found.rank(2), found.rank(4), found.rank(1)) == (2, 2, 4)  # ties share the middle of 1, 2
    with pytest.raises(InputError, match="no score"):
        found.rank(0)
    joined = found.words("so unlikely!", [(0, 0), (2, 5), (5, 9), (9, 11), (11, 12)])
    assert joined.tokens == ["unlikely", "!"]
    assert joined.scores == pytest.approx([0.7, 0.3])


def test_refusals() -> None:
    with pytest.raises(InputError, match="one score a token"):
        Attribution(["a"], [1.0, 2.0])
    with pytest.raises(InputError, match="as many scores"):
        deletion_curve(_probability, IDS, WORTH.numpy()[:2], 0)
    with pytest.raises(InputError, match="Replacements"):
        deletion_curve(_probability, IDS, WORTH.numpy(), torch.tensor([0]))
    with pytest.raises(InputError, match="scale is"):
        strengths(np.ones(3), "softmax")
    with pytest.raises(InputError, match="keep=2"):
        average_drop(_probability, IDS, WORTH.numpy(), 0, keep=2)
    with pytest.raises(InputError, match="samples=0"):
        soft_sufficiency(_predict, torch.ones(4, 2), WORTH.numpy(), samples=0)
