"""Exact search in memory, against a float64 reference written from the definition."""

from __future__ import annotations

import numpy as np
import pytest

import polyhead.search.view as view_module
from polyhead.errors import InputError
from polyhead.search.heads import head_statistics, prepare_heads
from polyhead.search.view import ArrayView, spread_of, top_k


def reference(queries: np.ndarray, matrix: np.ndarray, k: int) -> np.ndarray:
    scores = queries.astype(np.float64) @ matrix.astype(np.float64).T
    return np.stack([np.lexsort((np.arange(len(matrix)), -line))[:k] for line in scores])


@pytest.mark.parametrize("n", [1, 63, 500, 20_000])
@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_top_k_is_exact(n: int, k: int, dtype: type) -> None:
    generator = np.random.default_rng(n + k)
    matrix = generator.standard_normal((n, 24)).astype(dtype)
    queries = generator.standard_normal((7, 24)).astype(np.float32)
    rows, scores = top_k(queries, matrix, k)
    assert rows.shape == scores.shape == (7, k)
    assert rows.dtype == np.int64
    assert scores.dtype == np.float32
    found = min(n, k)
    np.testing.assert_array_equal(rows[:, :found], reference(queries, matrix, k))
    expected = np.take_along_axis(queries.astype(np.float64) @ matrix.astype(np.float64).T, rows[:, :found], 1)
    np.testing.assert_allclose(scores[:, :found], expected, rtol=1e-4, atol=1e-5)
    assert (rows[:, found:] == -1).all()
    assert np.isneginf(scores[:, found:]).all()


def test_top_k_gives_ties_to_the_lower_row() -> None:
    generator = np.random.default_rng(0)
    matrix = generator.integers(-1, 2, (9_000, 4)).astype(np.float32)  # whole numbers: many exact ties
    queries = generator.integers(-2, 3, (5, 4)).astype(np.float32)
    rows, _ = top_k(queries, matrix, 50)
    np.testing.assert_array_equal(rows, reference(queries, matrix, 50))


def test_top_k_in_small_blocks_equals_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    matrix = generator.integers(-3, 4, (3_000, 5)).astype(np.float32)
    queries = generator.integers(-3, 4, (40, 5)).astype(np.float32)
    whole = top_k(queries, matrix, 20)
    monkeypatch.setattr(view_module, "SCORES_AT_ONCE", 2_048)
    monkeypatch.setattr(view_module, "WIDENED_ROWS", 128)
    for blocks in (top_k(queries, matrix, 20), top_k(queries, matrix.astype(np.float16), 20)):
        np.testing.assert_array_equal(blocks[0], whole[0])
        np.testing.assert_array_equal(blocks[1], whole[1])


def test_top_k_of_nothing() -> None:
    rows, scores = top_k(np.ones((2, 3), np.float32), np.zeros((0, 3), np.float32), 4)
    assert (rows == -1).all()
    assert np.isneginf(scores).all()


def test_array_view_answers_what_strategies_ask() -> None:
    generator = np.random.default_rng(2)
    dense = generator.standard_normal((30, 8)).astype(np.float32)
    heads = generator.standard_normal((30, 12)).astype(np.float16)
    view = ArrayView(dense, heads, documents=np.arange(30) // 3, records=[{"id": f"row {i}"} for i in range(30)])
    assert view.n == 30
    rows, _ = view.nearest(heads[:2].astype(np.float32) * 3, "heads", 1)
    assert rows[:, 0].tolist() == [0, 1]
    np.testing.assert_array_equal(view.vectors(np.array([4, 2]), "heads"), heads[[4, 2]].astype(np.float32))
    assert [record["id"] for record in view.fetch(np.array([7, 3]))] == ["row 7", "row 3"]
    assert "30" in view.plan


def test_spread_is_the_deviation_of_random_pairs() -> None:
    generator = np.random.default_rng(3)
    dense = generator.standard_normal((1_500, 32))
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    products = (dense @ dense.T)[np.triu_indices(1_500, 1)]
    assert spread_of(dense.astype(np.float32)) == pytest.approx(products.std(), rel=0.05)
    assert spread_of(dense[:1].astype(np.float32)) == 0.0


def test_prepared_heads_are_cosines_after_the_mean_is_taken_off() -> None:
    generator = np.random.default_rng(4)
    raw = generator.standard_normal((6, 2, 3, 5)) + 4.0
    mean = raw.mean(0)
    prepared = prepare_heads(raw.astype(np.float32), mean.astype(np.float32))
    assert prepared.shape == (6, 30)
    expected = 0.0
    for layer in range(2):
        for head in range(3):
            a, b = raw[0, layer, head] - mean[layer, head], raw[1, layer, head] - mean[layer, head]
            expected += a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert float(prepared[0] @ prepared[1]) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="layers, heads, head_dim"):
        prepare_heads(raw.astype(np.float32), mean[:1].astype(np.float32))


def test_importance_is_mean_norm_times_mean_cosine_distance() -> None:
    generator = np.random.default_rng(5)
    raw = generator.standard_normal((400, 1, 2, 6))
    raw[:, 0, 1] = raw[:, 0, 1] * 0.1 + 3.0  # a long head that hardly varies
    mean, importance = head_statistics(raw.astype(np.float32))
    np.testing.assert_allclose(mean, raw.mean(0), atol=1e-5)
    for head in range(2):
        vectors = raw[:, 0, head]
        norms = np.linalg.norm(vectors, axis=1)
        cosines = (vectors @ vectors.T / np.outer(norms, norms))[np.triu_indices(400, 1)]
        assert importance[0, head] == pytest.approx(norms.mean() * (1 - cosines.mean()), rel=0.03, abs=1e-3)
    assert importance[0, 0] > importance[0, 1]
