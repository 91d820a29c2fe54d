"""Alignment and uniformity as metrics: the objectives' values, pair by pair sums, and resamples without self-pairs."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from small_tasks import coarse, letters, pairs

from polyhead.errors import InputError
from polyhead.evaluate.align_uniform import measure_align_uniform
from polyhead.evaluate.measured import compare
from polyhead.objectives import alignment, uniformity


def test_values_are_those_of_the_objectives():
    data = pairs()
    found = measure_align_uniform(data, letters, positive=3.0)
    chosen = [pair for pair, gold in zip(data.pairs, data.gold, strict=True) if gold >= 3]
    sides = [torch.tensor(letters([pair[side] for pair in chosen])).double() for side in (0, 1)]
    every = torch.tensor(letters(list(dict.fromkeys(text for pair in data.pairs for text in pair)))).double()
    assert found["-alignment"].value == pytest.approx(-float(alignment(*sides)), abs=1e-6)
    assert found["-alignment"].n == len(chosen)
    assert found["-uniformity"].value == pytest.approx(-float(uniformity(every)), abs=1e-6)


def test_a_resample_counts_pairs_of_different_sentences_only():
    data = pairs(10)
    texts = list(dict.fromkeys(text for pair in data.pairs for text in pair))
    found = measure_align_uniform(data, letters, positive=0.0)["-uniformity"]
    x = letters(texts).astype(float)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    rows = np.array([0, 0, 3, 5, 5, 5, 7, *range(8, len(texts))])
    terms = [np.exp(-2 * np.sum((x[i] - x[j]) ** 2)) for i, j in combinations(rows, 2) if i != j]
    assert found.of(rows) == pytest.approx(-np.log(np.mean(terms)))


def test_a_report_of_two_encoders():
    measured = {name: measure_align_uniform(pairs(), one) for name, one in (("many", letters), ("few", coarse))}
    report = compare(measured)
    by_metric = {row.metric: row for row in report.comparisons}
    assert by_metric["-uniformity"].difference > 0
    assert by_metric["-uniformity"].p_holm < 0.05
    with pytest.raises(InputError, match="no pair scored 9"):
        measure_align_uniform(pairs(), letters, positive=9)
