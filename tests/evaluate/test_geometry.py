"""Measures of a cloud of vectors against closed forms, their definitions and IsoScore's own package."""

from __future__ import annotations

import numpy as np
import pytest
from IsoScore import IsoScore
from scipy.linalg import fractional_matrix_power
from scipy.spatial.distance import pdist, squareform

from polyhead.errors import InputError
from polyhead.evaluate.geometry import curvature, dime, effective_rank, infonce, isotropy, lidar, matrix_entropy


def cloud(seed: int, n: int = 40, dim: int = 6) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, dim)) * np.linspace(1, 4, dim) + 2


@pytest.mark.parametrize("seed", range(4))
def test_isoscore_equals_its_authors_package(seed):
    x = cloud(seed)
    assert isotropy(x) == pytest.approx(float(IsoScore.IsoScore(x)), abs=1e-6)
    assert isotropy(3 * x + 7) == pytest.approx(isotropy(x))


def test_isoscore_at_its_ends():
    corners = np.concatenate([np.eye(5), -np.eye(5)])
    assert isotropy(corners) == pytest.approx(1.0)
    assert isotropy(corners * [1, 0, 0, 0, 0]) == pytest.approx(0.0)
    # k of n directions used alike: the score is about the share of directions (its authors' second property).
    assert isotropy(corners * [1, 1, 0, 0, 0]) == pytest.approx((2 - 1) / (5 - 1))
    few = np.random.default_rng(0).normal(size=(3, 8))
    assert 0 < isotropy(few) < 0.3


def test_partition_score_by_definition_and_its_ends():
    x = cloud(1) / 5
    directions = np.linalg.svd(x)[2]
    sums = [np.exp(x @ (sign * u)).sum() for u in directions for sign in (1, -1)]
    assert isotropy(x, "partition") == pytest.approx(min(sums) / max(sums))
    assert isotropy(np.concatenate([np.eye(4), -np.eye(4)]), "partition") == pytest.approx(1.0)
    assert 0 <= isotropy(x + 100, "partition") < 1e-12
    with pytest.raises(InputError, match="expected 'isoscore'"):
        isotropy(x, "cosine")
    with pytest.raises(InputError, match="the same"):
        isotropy(np.ones((4, 3)))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_matrix_entropy_by_the_gram_matrix(alpha):
    x = cloud(2, n=9)
    gram = x @ x.T
    values = np.linalg.eigvalsh(gram / np.trace(gram))
    values = values[values > 1e-12]
    expected = -(values * np.log(values)).sum() if alpha == 1 else np.log((values**alpha).sum()) / (1 - alpha)
    assert matrix_entropy(x, alpha) == pytest.approx(expected)
    assert matrix_entropy(np.eye(7), alpha) == pytest.approx(np.log(7))
    assert matrix_entropy(np.outer(np.arange(1, 5), np.ones(3)), alpha) == pytest.approx(0.0, abs=1e-9)


def test_effective_rank_counts_directions():
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    assert effective_rank(rotation[:4]) == pytest.approx(4.0)
    assert effective_rank(np.ones((5, 3))) == pytest.approx(1.0)
    singular = np.array([3.0, 1.0])
    shares = singular / 4
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(np.diag(singular)) == pytest.approx(expected)


def test_curvature_of_known_paths():
    assert curvature(np.outer(np.arange(5), [1.0, 2.0])) == pytest.approx(0.0, abs=1e-7)
    assert curvature(np.array([[0.0, 0], [1, 0], [1, 1], [2, 1]])) == pytest.approx(np.pi / 2)
    assert curvature(np.array([[0.0], [1], [0], [1]])) == pytest.approx(np.pi)
    turns = np.linspace(0, np.pi, 9)
    assert curvature(np.c_[np.cos(turns), np.sin(turns)]) == pytest.approx(np.pi / 8)
    still = np.array([[0.0, 0], [1, 0], [1, 0], [2, 0], [2, 1]])
    assert curvature(still) == pytest.approx(np.pi / 2)
    with pytest.raises(InputError, match="length"):
        curvature(np.zeros((4, 2)))
    with pytest.raises(InputError, match="at least 3"):
        curvature(np.zeros((2, 2)))


def test_infonce_by_definition_and_its_bounds():
    a, b = cloud(3), cloud(3) + 0.3 * cloud(4)
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (a, b))
    logits = x @ y.T / 0.1
    rows = -np.log(np.exp(logits.diagonal()) / np.exp(logits).sum(1)).mean()
    columns = -np.log(np.exp(logits.diagonal()) / np.exp(logits).sum(0)).mean()
    assert infonce(a, b) == pytest.approx(np.log(40) - (rows + columns) / 2)
    assert infonce(np.eye(8), np.eye(8), temperature=0.01) == pytest.approx(np.log(8), abs=1e-6)
    assert infonce(np.ones_like(a), np.ones_like(a)) == pytest.approx(0.0)
    with pytest.raises(InputError, match="one shape"):
        infonce(a, b[:5])


def entropy(kernel: np.ndarray) -> float:
    values = np.linalg.eigvalsh(kernel / np.trace(kernel))
    values = values[values > 1e-14]
    return float(-(values * np.log(values)).sum())


def test_dime_by_definition_and_without_anything_in_common():
    a = cloud(5, n=25)
    b = a + np.random.default_rng(6).normal(size=a.shape) * 0.2
    kernels = []
    for x in (a, b):
        squares = squareform(pdist(x, "sqeuclidean"))
        kernels.append(np.exp(-squares / (2 * np.median(pdist(x, "sqeuclidean")))))
    generator = np.random.default_rng(0)
    mixed = []
    for _ in range(5):
        p = np.eye(25)[generator.permutation(25)]
        mixed.append(entropy(kernels[0] * (p @ kernels[1] @ p.T)))
    assert dime(a, b) == pytest.approx(np.mean(mixed) - entropy(kernels[0] * kernels[1]))
    unrelated = np.random.default_rng(9).normal(size=a.shape)
    assert dime(a, b) > 5 * abs(dime(a, unrelated))


def test_lidar_by_definition_and_what_it_counts():
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(30, 4)) * [5, 5, 5, 0]
    views = centres[:, None] + 0.1 * generator.normal(size=(30, 6, 4))
    means = views.mean(1)
    between = sum(np.outer(m, m) for m in means - means.mean(0)) / 29
    within = sum(np.outer(v, v) for v in (views - means[:, None]).reshape(-1, 4)) / (30 * 5) + 1e-4 * np.eye(4)
    root = fractional_matrix_power(within, -0.5)
    values = np.linalg.eigvalsh(root @ between @ root)
    shares = values / values.sum()
    assert lidar(views) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert lidar(views) == pytest.approx(3.0, abs=0.2)
    with pytest.raises(InputError, match="at least two"):
        lidar(views[:, :1])
