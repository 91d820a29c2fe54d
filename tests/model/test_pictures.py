"""Pictures: drawn from the numbers given, legible at 6 x 12 and at 32 x 32, and head similarity by its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.plots import attention_grid, head_similarity, similarity_map


@pytest.mark.parametrize(("layers", "heads"), [(6, 12), (32, 32)])
def test_grid_has_a_picture_for_every_head(tmp_path, layers, heads):
    weights = np.random.default_rng(0).random((layers, heads, 7, 7))
    figure = attention_grid(torch.tensor(weights), tmp_path / "grid.png")
    assert len(figure.axes) == layers * heads
    np.testing.assert_allclose(figure.axes[heads + 2].images[0].get_array(), weights[1, 2], rtol=1e-6)
    assert (tmp_path / "grid.png").stat().st_size > 5_000
    width, height = figure.get_size_inches()
    assert min(width / heads, height / layers) > 0.3, "inches a head"


def test_one_head_shows_its_tokens():
    figure = attention_grid(np.eye(3)[None, None], tokens=["a", "b", "c"])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["a", "b", "c"]
    with pytest.raises(InputError, match="2 tokens were named, the attention has 3 keys"):
        attention_grid(np.eye(3)[None, None], tokens=["a", "b"])
    with pytest.raises(InputError, match=r"needs \[layers, heads, queries, keys\]"):
        attention_grid(np.eye(3))


def test_similarity_is_linear_cka():
    generator = np.random.default_rng(1)
    heads = generator.standard_normal((2, 2, 3, 5, 4))  # [batch, layers, heads, tokens, head_dim]
    rotation, _ = np.linalg.qr(generator.standard_normal((4, 4)))
    heads[:, 1, 0] = 3.0 * heads[:, 0, 1] @ rotation  # the same head, turned and scaled
    found = head_similarity(heads)
    features = [heads[:, layer, head].reshape(10, 4) for layer in range(2) for head in range(3)]
    for row, x in enumerate(features):
        for column, y in enumerate(features):
            x0, y0 = x - x.mean(0), y - y.mean(0)
            k, m = x0 @ x0.T, y0 @ y0.T  # the definition by kernels, not by the products used in the package
            assert found[row, column] == pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))
    assert found[1, 3] == pytest.approx(1.0)
    figure = similarity_map(found, heads=3)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), found)
    with pytest.raises(InputError, match="multiple of 4 heads"):
        similarity_map(found, heads=4)


def test_maps_against_each_other_and_on_pages(tmp_path):
    a = HeadMap(np.arange(12.0).reshape(3, 4), "a", "m")
    b = HeadMap(-np.arange(12.0).reshape(3, 4), "b", "m")
    figure = a.plot_against(b, tmp_path / "scatter.svg")
    assert "-1.000" in figure.axes[0].get_title()
    assert len(figure.axes[0].collections[0].get_offsets()) == 12
    assert (tmp_path / "scatter.svg").read_text().startswith("<?xml")
    page = a.to_plotly()
    assert [list(row) for row in page.data[0].z] == a.values.tolist()
    assert a.overlap(b, 0.25) == 0.0
    assert a.overlap(a * 2, 3) == 1.0
    assert a.overlap(HeadMap(np.roll(a.values, 1)), 2) == 0.5
    with pytest.raises(InputError, match="no heads at all"):
        a.overlap(b, 0.01)
    assert a.in_words(2) == "Highest (more): L2H3 (11), L2H2 (10)."
    assert HeadMap(np.full((2, 2), np.nan), "empty").in_words() == "No head has a value of empty."
