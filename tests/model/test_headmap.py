"""HeadMap: order, arithmetic, files, errors."""

from __future__ import annotations

import numpy as np
import pytest

from polyhead.errors import InputError
from polyhead.headmap import HeadMap


@pytest.fixture
def some():
    return HeadMap([[0.1, 0.9, np.nan], [0.5, 0.3, 0.9]], name="score", model="m", data="d", higher_means="matters")


def test_top_counts_fractions_ties_and_nan(some):
    assert some.top(3) == [(0, 1), (1, 2), (1, 0)]
    assert some.top(0.4) == [(0, 1), (1, 2)]
    assert some.top(0) == []
    assert some.mask(2).tolist() == [[False, True, False], [False, False, True]]
    for wrong in (6, -1, 1.5, -0.1):
        with pytest.raises(InputError, match="was asked for"):
            some.top(wrong)


def test_arithmetic_says_what_was_done(some):
    other = HeadMap(np.full((2, 3), 2.0), name="two")
    assert np.allclose((some * other).values, some.values * 2, equal_nan=True)
    assert (some * other).name == "(score * two)"
    assert np.allclose((1 - some).values, 1 - some.values, equal_nan=True)
    assert (1 - some).name == "(1 - score)"
    assert np.allclose((some / 2 + 1 - other).values, some.values / 2 - 1, equal_nan=True)
    assert (-some).top(1) == [(0, 0)]
    with pytest.raises(InputError, match="2 layers x 3 heads"):
        some + HeadMap(np.zeros((3, 2)))
    with pytest.raises(TypeError):
        some + "text"


def test_rank_correlation_by_hand(some):
    falling = HeadMap(-some.values)
    assert some.rank_correlation(falling) == pytest.approx(-1.0)
    assert some.rank_correlation(some * 3) == pytest.approx(1.0)
    with pytest.raises(InputError, match="in common"):
        some.rank_correlation(HeadMap(np.full((2, 3), np.nan)))


def test_files_keep_every_digit(some, tmp_path):
    odd = some * (1 / 3)
    odd.save(tmp_path / "map.json")
    assert HeadMap.load(tmp_path / "map.json") == odd
    (tmp_path / "other.json").write_text('{"values": [[1]]}')
    with pytest.raises(InputError, match="no HeadMap"):
        HeadMap.load(tmp_path / "other.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        HeadMap.load(tmp_path / "broken.json")
    with pytest.raises(InputError, match="layers, heads"):
        HeadMap(np.zeros(3))


def test_frame_and_plot(some, tmp_path):
    pytest.importorskip("pandas")
    pytest.importorskip("matplotlib")
    frame = some.to_frame()
    assert frame.loc[(frame.layer == 1) & (frame["head"] == 2), "score"].item() == 0.9
    figure = some.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert figure.axes[0].get_xlabel() == "head"
