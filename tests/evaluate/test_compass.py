"""Thresholds, overlaps, shifts and the comparison of encoders against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ks_2samp, norm
from small_tasks import coarse, letters, retrieval

from polyhead.errors import InputError
from polyhead.evaluate.compass import SimilarityThreshold, compare_embedders, domain_shift, overlap
from polyhead.evaluate.geometry import isotropy


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_best_of_all(seed):
    generator = np.random.default_rng(seed)
    right, random = generator.normal(1, 1, 30).round(1), generator.normal(0, 1, 50).round(1)
    found = SimilarityThreshold().fit(right, random)
    every = {t: (right >= t).mean() + (random < t).mean() for t in np.unique([*right, *random])}
    assert found.passed_ + found.stopped_ == pytest.approx(max(every.values()))
    assert every[found.threshold_] == pytest.approx(max(every.values()))
    asked = SimilarityThreshold(recall=0.9).fit(right, random)
    assert asked.passed_ >= 0.9
    assert (right > asked.threshold_).mean() < 0.9


def test_overlap_is_one_less_the_kolmogorov_smirnov_distance():
    generator = np.random.default_rng(0)
    a, b = generator.normal(0, 1, 4000), generator.normal(1.5, 1, 3000)
    assert overlap(a, b) == pytest.approx(1 - ks_2samp(a, b).statistic)
    assert overlap(a, b) == pytest.approx(2 * norm.cdf(-0.75), abs=0.03)  # area under both densities
    assert overlap(a, a) == 1.0
    assert overlap([1, 2], [3, 4]) == 0.0
    with pytest.raises(InputError, match="neither empty"):
        overlap([], [1.0])


def test_shift_is_the_distance_of_mean_directions():
    generator = np.random.default_rng(1)
    domain, general = generator.normal(size=(30, 5)) + 1, generator.normal(size=(40, 5))
    means = [np.mean([row / np.linalg.norm(row) for row in side], axis=0) for side in (domain, general)]
    found = domain_shift(domain, general)
    assert found.value == pytest.approx(np.linalg.norm(means[0] - means[1]))
    assert found.low < found.value < found.high
    assert domain_shift(5 * domain, general).value == pytest.approx(found.value)


def test_encoders_are_compared_by_what_they_rank_first():
    data = retrieval()
    found = compare_embedders(data, {"letters": letters, "coarse": coarse, "again": letters}, k=3)
    names, texts = list(data.corpus), letters(list(data.corpus.values())).astype(float)
    hits = {1: [], 3: []}
    for query, text in data.queries.items():
        asked = letters([text])[0].astype(float)
        cosine = [float(t @ asked / np.linalg.norm(t) / np.linalg.norm(asked)) for t in texts]
        order = [names[i] for i in np.argsort([-c for c in cosine], kind="stable")]
        for cut, kept in hits.items():
            kept.append(any(name in data.qrels[query] for name in order[:cut]))
    for cut, kept in hits.items():
        assert found.accuracy.results["letters"][f"accuracy@{cut}"].value == pytest.approx(np.mean(kept))
    facts = found.facts["letters"]
    assert facts["isoscore"] == pytest.approx(isotropy(texts))
    assert facts["overlap"] < found.facts["coarse"]["overlap"]
    assert 0 < facts["passed"] <= 1
    assert {(c.b, c.p) for c in found.accuracy.comparisons if c.b == "again"} == {("again", 1.0)}
    assert found.explains("overlap") < 0
    assert found.to_json()["facts"] == found.facts
    with pytest.raises(InputError, match="k = 0"):
        compare_embedders(data, {"letters": letters}, k=0)
