"""What vectors of a given size cannot return, against geometry."""

from __future__ import annotations

import numpy as np
import pytest

from polyhead.errors import InputError
from polyhead.evaluate.limit import all_pairs, critical_n, free_embedding_fit, sign_rank_bounds


def test_all_pairs_are_all_pairs() -> None:
    found = all_pairs(5)
    assert found.shape == (10, 5)
    assert (found.sum(1) == 2).all()
    assert len({tuple(row) for row in found.tolist()}) == 10


def test_free_vectors_end_where_geometry_says() -> None:
    # On a circle only neighbours come first together: of four documents, opposite ones never do.
    assert free_embedding_fit(all_pairs(3), 2, steps=200) == 1.0
    assert free_embedding_fit(all_pairs(4), 2, steps=200) == pytest.approx(4 / 6)
    # On a sphere the pairs that come first together are a planar graph: complete for 4 documents, not for 5.
    assert critical_n(3, steps=200, most=6) == 4
    assert critical_n(4, steps=50, tries=1, most=6) > 4


def test_bounds_on_size_hold_for_what_is_known() -> None:
    # Every question its own document: three numbers are enough (points on a parabola), and the rank is full.
    low, high = sign_rank_bounds(np.eye(8, dtype=bool))
    assert 1 <= low <= high == 3
    assert free_embedding_fit(np.eye(8, dtype=bool), high, steps=300) == 1.0
    # A Hadamard matrix has all singular values sqrt(n), which is Forster's best case: at least sqrt(n).
    hadamard = np.array([[1]])
    for _ in range(4):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    low, _ = sign_rank_bounds(hadamard[1:] > 0)
    assert low == pytest.approx(np.sqrt(15 * 16) / 4 - 1)
    assert sign_rank_bounds(all_pairs(9))[1] == 5


def test_bad_relevance_is_refused() -> None:
    with pytest.raises(InputError, match="at least one relevant"):
        free_embedding_fit(np.zeros((2, 3), dtype=bool), 2)
    with pytest.raises(InputError, match="at least 1"):
        free_embedding_fit(all_pairs(3), 0)
