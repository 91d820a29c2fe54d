"""Areas under risk-coverage curves against sums over orders, the paper's identity and scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from polyhead.errors import InputError
from polyhead.evaluate.selective import (
    augrc,
    aurc,
    compare_confidences,
    confidences,
    e_aurc,
    failure_auroc,
    risk_coverage,
)


def by_hand(order: list[int], wrong: np.ndarray) -> tuple[float, float]:
    """AUGRC by trapezoids and AURC as a mean of selective risks, for one strict order, in plain sums."""
    n, failed, general, selective = len(order), 0.0, 0.0, 0.0
    for accepted, row in enumerate(order, start=1):
        before, failed = failed, failed + wrong[row]
        general += (before + failed) / 2 / n / n
        selective += failed / accepted / n
    return general, selective


@pytest.mark.parametrize("seed", range(4))
def test_areas_by_definition_with_any_loss(seed):
    generator = np.random.default_rng(seed)
    sure, wrong = generator.permutation(12).astype(float), generator.random(12)
    expected = by_hand(sorted(range(12), key=lambda row: -sure[row]), wrong)
    assert (augrc(sure, wrong), aurc(sure, wrong)) == pytest.approx(expected)


def test_ties_count_as_the_mean_over_all_orders():
    sure, wrong = np.array([2.0, 2, 2, 1, 1, 0]), np.array([1.0, 0, 1, 0, 1, 1])
    orders = [[*a, *b, 5] for a in itertools.permutations([0, 1, 2]) for b in itertools.permutations([3, 4])]
    expected = np.mean([by_hand(order, wrong) for order in orders], axis=0)
    assert (augrc(sure, wrong), aurc(sure, wrong)) == pytest.approx(tuple(expected))


@pytest.mark.parametrize("levels", [5, 10_000])
def test_augrc_is_a_matter_of_auroc_and_accuracy(levels):
    generator = np.random.default_rng(levels)
    wrong = (generator.random(300) < 0.3).astype(float)
    sure = generator.integers(0, levels, 300) - wrong * levels / 3
    accuracy = 1 - wrong.mean()
    ranking = failure_auroc(sure, wrong)
    assert ranking == pytest.approx(roc_auc_score(1 - wrong, sure), abs=1e-12)
    identity = (1 - ranking) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2
    assert augrc(sure, wrong) == pytest.approx(identity, abs=1e-12)


def test_ends_of_the_range():
    wrong = np.array([1.0] * 30 + [0.0] * 70)
    assert augrc(-wrong, wrong) == pytest.approx(0.3**2 / 2)
    assert augrc(np.zeros(100), wrong) == pytest.approx(0.3 / 2)
    assert augrc(np.arange(3), np.ones(3)) == pytest.approx(0.5)
    assert e_aurc(-wrong, wrong) == pytest.approx(0.0)
    assert e_aurc(wrong, wrong) > e_aurc(np.zeros(100), wrong) > 0
    assert np.isnan(failure_auroc([1, 2], [0, 0]))


def test_aurc_overweighs_one_sure_failure_and_augrc_does_not():
    wrong = np.zeros(100)
    wrong[0] = 1  # the surest fails
    later = np.roll(wrong, 10)
    sure = -np.arange(100.0)
    assert aurc(sure, wrong) / aurc(sure, later) > 2
    assert augrc(sure, wrong) / augrc(sure, later) < 1.2


def test_curve_by_hand():
    curve = risk_coverage([3, 1, 1, 2], [0, 1, 0, 1])
    assert curve.coverage.tolist() == [0, 0.25, 0.5, 1]
    assert curve.selective.tolist() == [0, 0, 0.5, 0.5]
    assert curve.generalised.tolist() == [0, 0, 0.25, 0.5]


def test_confidences_by_definition():
    p = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]])
    vectors, known = np.array([[1.0, 0], [0, 2]]), np.array([[2.0, 0], [1, 1], [0, 1]])
    found = confidences(p, vectors=vectors, known=known, k=2)
    assert found["maximum"].tolist() == [0.7, 0.4]
    assert found["margin"] == pytest.approx([0.5, 0.05])
    assert found["negative entropy"] == pytest.approx((p * np.log(p)).sum(1))
    assert found["squares"] == pytest.approx([0.54, 0.345])
    assert found["nearest"] == pytest.approx([(1 + np.sqrt(0.5)) / 2 - 1] * 2)
    assert found["centre"] == pytest.approx([np.sqrt(0.5)] * 2)
    assert list(confidences(np.array([[1.0, 0.0]]))) == ["maximum", "margin", "negative entropy", "squares"]
    assert np.isfinite(confidences(np.array([[1.0, 0.0]]))["negative entropy"]).all()


def test_comparison_tells_a_good_confidence_from_noise():
    generator = np.random.default_rng(0)
    wrong = (generator.random(200) < 0.25).astype(float)
    scores = {"good": generator.normal(size=200) - 2 * wrong, "noise": generator.normal(size=200)}
    report = compare_confidences(scores, wrong)
    for row in report.comparisons:
        assert row.difference > 0
        assert row.p_holm < 0.05
    assert report.results["good"]["-augrc"].value == pytest.approx(-augrc(scores["good"], wrong))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: augrc([1, 2], [0, 2]), "0 to 1"),
        (lambda: augrc([1, 2], [0]), "one error an example"),
        (lambda: failure_auroc([1, 2], [0, 0.5]), "0 and 1"),
        (lambda: confidences(np.ones((2, 2))), "sum to 1"),
        (lambda: confidences(np.eye(2), vectors=np.eye(2), known=np.eye(2), k=3), "at least 3"),
        (lambda: compare_confidences({"a": np.arange(3)}, np.zeros(3)), "some of both"),
    ],
)
def test_what_cannot_be_judged_says_why(call, message):
    with pytest.raises(InputError, match=message):
        call()
