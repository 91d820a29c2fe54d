"""Batches and chunks: nothing lost, nothing twice, budgets kept, words whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyhead.embed.batching import token_batches
from polyhead.embed.chunking import token_windows
from polyhead.errors import InputError


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 200))
def test_every_sequence_is_in_one_batch(lengths: list[int], budget: int) -> None:
    sequences = [np.arange(1, length + 1) for length in lengths]
    seen: list[int] = []
    widths = []
    for batch in token_batches(sequences, budget=budget, pad_id=99, multiple=8, limit=50):
        seen += batch.rows.tolist()
        widths.append(batch.ids.shape[1])
        assert len(batch.rows) == 1 or batch.ids.size <= budget
        assert batch.ids.shape[1] <= 50
        for row, ids, mask in zip(batch.rows, batch.ids, batch.mask, strict=True):
            assert ids[mask == 1].tolist() == sequences[row].tolist()
            assert mask[: lengths[row]].all()
            assert (ids[mask == 0] == 99).all()
    assert sorted(seen) == [row for row, length in enumerate(lengths) if length > 0]
    assert widths == sorted(widths, reverse=True)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=80), st.integers(2, 30), st.data())
def test_windows_cover_all_tokens_and_keep_words(words: list[int], capacity: int, data: st.DataObject) -> None:
    numbers = [number for number, length in enumerate(words) for _ in range(length)]
    overlap = data.draw(st.integers(0, capacity - 1))
    windows = token_windows(numbers, capacity, overlap)
    assert windows[0][0] == 0
    assert windows[-1][1] == len(numbers)
    for (begin, end), (next_begin, next_end) in pairwise(windows):
        assert begin < next_begin <= end < next_end, "the next window overlaps or touches, and brings something new"
        assert end - next_begin >= overlap
    assert all(1 <= end - begin <= capacity for begin, end in windows)


def test_windows_are_even_and_cut_between_words() -> None:
    numbers = [token // 3 for token in range(90)]
    windows = token_windows(numbers, 40, 6)
    assert all(begin % 3 == 0 and (end % 3 == 0) for begin, end in windows)
    sizes = [end - begin for begin, end in windows]
    assert max(sizes) - min(sizes) <= 6, sizes


def test_overlap_must_leave_room() -> None:
    with pytest.raises(InputError, match="overlap = 10"):
        token_windows([0, 1], 10, 10)
