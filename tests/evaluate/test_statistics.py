"""Intervals and tests against SciPy and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from polyhead.errors import InputError
from polyhead.evaluate.statistics import bootstrap_interval, holm, paired_permutation


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(3).beta(2, 5, 80)
    ours = bootstrap_interval(values, resamples=20_000, seed=1)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", random_state=2)
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.003)
    assert ours.n == 80


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        found = bootstrap_interval(generator.normal(0.3, 1.0, 60), resamples=500, seed=trial)
        hits += found.low <= 0.3 <= found.high
    assert 0.88 <= hits / 200 <= 0.99


def test_interval_is_the_same_for_a_seed_and_any_block_size(monkeypatch):
    values = np.random.default_rng(1).random(30)
    assert bootstrap_interval(values, seed=5) == bootstrap_interval(values, seed=5)
    assert bootstrap_interval(values, seed=5) != bootstrap_interval(values, seed=6)


@pytest.mark.parametrize("n", [6, 12])
def test_exact_permutation_equals_scipy(n):
    generator = np.random.default_rng(n)
    a, b = generator.random(n), generator.random(n)
    theirs = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf)
    assert paired_permutation(a, b) == pytest.approx(theirs.pvalue)


def test_sampled_permutation_is_near_the_exact_one():
    generator = np.random.default_rng(4)
    a = generator.random(13)
    b = a + generator.normal(0.05, 0.1, 13)
    exact = paired_permutation(a, b, resamples=10_000)
    assert paired_permutation(a, b, resamples=8_000, seed=1) == pytest.approx(exact, abs=0.02)


def test_false_positives_stay_near_the_level():
    generator = np.random.default_rng(7)
    below = [
        paired_permutation(x[:, 0], x[:, 1], resamples=400, seed=i) < 0.05
        for i, x in enumerate(generator.random((300, 25, 2)))
    ]
    assert 0.02 <= np.mean(below) <= 0.09


def test_equal_lists_are_not_told_apart_and_order_does_not_matter():
    values = np.random.default_rng(0).random(40)
    assert paired_permutation(values, values) == 1.0
    other = values[::-1]
    assert paired_permutation(values, other, seed=1) == paired_permutation(other, values, seed=1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="at least one value"):
        bootstrap_interval([])
    with pytest.raises(InputError, match="3 and 2 values"):
        paired_permutation([1, 2, 3], [1, 2])
