"""Intrinsic dimension on manifolds of known dimension and against scikit-dimension; label sharpness by all pairs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import skdim
import torch
from tiny import tiny

import polyhead
from polyhead.errors import InputError
from polyhead.evaluate.intrinsic import (
    dataset_report,
    head_dimension,
    intrinsic_dimension,
    label_sharpness,
    neighbour_distances,
    representation_dimension,
)
from polyhead.evaluate.layers import layer_vectors


def manifold(kind: str, n: int = 1500, seed: int = 0) -> np.ndarray:
    """Points of a known dimension, in 30 numbers, turned at random."""
    generator = np.random.default_rng(seed)
    turn = np.linalg.qr(generator.normal(size=(30, 30)))[0]
    if kind == "circle":
        angle = generator.uniform(0, 2 * np.pi, n)
        points = np.c_[np.cos(angle), np.sin(angle)]
    elif kind == "sphere":
        points = generator.normal(size=(n, 5))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
    elif kind == "roll":
        angle, height = 1.5 * np.pi * (1 + 2 * generator.random(n)), 21 * generator.random(n)
        points = np.c_[angle * np.cos(angle), height, angle * np.sin(angle)]
    else:
        points = generator.random((n, 7))
    return points @ turn[: points.shape[1]]


@pytest.mark.parametrize(("kind", "dimension"), [("circle", 1), ("roll", 2), ("sphere", 4), ("cube", 7)])
def test_dimension_of_known_manifolds(kind, dimension):
    x = manifold(kind)
    for method in ("mle", "twonn"):
        # Both fall short the higher the dimension, as they must with so few points near an edge.
        assert intrinsic_dimension(x, method) == pytest.approx(dimension, rel=0.05 + 0.02 * dimension)


@pytest.mark.parametrize("kind", ["roll", "cube"])
def test_dimension_equals_scikit_dimension(kind):
    x = manifold(kind, 400)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twonn = skdim.id.TwoNN().fit(x).dimension_
        local = skdim.id.MLE(neighborhood_based=True, K=20).fit(x, n_neighbors=20).dimension_pw_
    assert intrinsic_dimension(x, "twonn") == pytest.approx(twonn, rel=1e-6)
    # Its local estimates average the k - 1 logs; the mean of their inverses is MacKay's and Ghahramani's.
    assert intrinsic_dimension(x) == pytest.approx(1 / np.mean(1 / local), rel=1e-6)


def test_mle_by_definition_and_what_does_not_change_it():
    x = manifold("sphere", 120)
    distance = np.linalg.norm(x[:, None] - x[None], axis=2)
    near = np.sort(distance, axis=1)[:, 1:9]
    inverse = [np.mean([np.log(row[-1] / row[j]) for j in range(7)]) for row in near]
    assert intrinsic_dimension(x, k=8) == pytest.approx(1 / np.mean(inverse))
    assert intrinsic_dimension(1e3 * x + 5, k=8) == pytest.approx(1 / np.mean(inverse), rel=1e-6)
    assert intrinsic_dimension(np.concatenate([x, x[:40]]), k=8) == pytest.approx(1 / np.mean(inverse))
    np.testing.assert_allclose(neighbour_distances(x, 8), near, rtol=1e-9)


def test_sharpness_is_the_steepest_of_all_pairs():
    generator = np.random.default_rng(2)
    x, labels = generator.normal(size=(60, 4)), generator.integers(0, 3, 60)
    steepest = max(
        float(labels[i] != labels[j]) / np.linalg.norm(x[i] - x[j]) for i in range(60) for j in range(60) if i != j
    )
    assert label_sharpness(x, labels) == pytest.approx(steepest)
    assert label_sharpness(x * 2, [str(label) for label in labels]) == pytest.approx(steepest / 2)
    assert label_sharpness(x, labels, pairs=20) <= steepest
    apart = np.concatenate([x, x + 100])
    assert label_sharpness(apart, [0] * 60 + [1] * 60) < 0.01
    assert label_sharpness(np.zeros((2, 3)), [0, 1]) == float("inf")


def test_report_holds_the_estimate_in_its_interval_and_counts_copies():
    x = manifold("cube", 300)
    x[5] = x[6]
    found = dataset_report(x, np.arange(300) % 2, k=10, resamples=20)
    assert found.dimension.low < found.dimension.value < found.dimension.high
    assert found.dimension.value == pytest.approx(intrinsic_dimension(x, k=10))
    assert (found.n, found.copies, found.ambient, found.dimension.n) == (300, 1, 30, 299)
    assert found.sharpness == float("inf")
    assert set(found.to_json()) == {"dimension", "twonn", "sharpness", "n", "ambient", "copies"}


def test_dimension_of_layers_and_heads_of_a_model():
    model = polyhead.load(tiny("bert"))

    def tokenize(texts, **_):
        ids = torch.tensor([[int(word) for word in text.split()] for text in texts])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    model.__dict__["tokenizer"] = tokenize
    texts = [" ".join(map(str, row)) for row in np.random.default_rng(0).integers(3, 90, (40, 6))]
    curve = representation_dimension(model, texts, k=5)
    vectors, _ = layer_vectors(model, texts)
    expected = [intrinsic_dimension(vectors[:, place], k=5) for place in range(3)]
    np.testing.assert_allclose(curve.values, expected)
    heads = head_dimension(model, texts, "twonn")
    assert heads.shape == (2, 4)
    assert (heads.values > 0).all()
    assert heads.name == "intrinsic dimension (twonn)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: intrinsic_dimension(x, "pca"), "'mle' or 'twonn'"),
        (lambda x: intrinsic_dimension(x, k=1), "at least 2"),
        (lambda x: intrinsic_dimension(x, k=50), "n above 50"),
        (lambda x: intrinsic_dimension(x, "twonn", discard=1.0), "discard"),
        (lambda x: intrinsic_dimension(np.eye(30)), "equal"),
        (lambda x: label_sharpness(x, np.zeros(30)), "one label"),
        (lambda x: label_sharpness(x, np.zeros(3)), "a label each"),
        (lambda x: dataset_report(x, np.arange(30)), "more than 40|More than 40"),
    ],
)
def test_what_has_no_dimension_says_why(call, message):
    with pytest.raises(InputError, match=message):
        call(manifold("cube", 30))
