"""Attention pooling against its definition, text by text in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.func import functional_call

from polyhead.errors import InputError
from polyhead.pooling import AttentionPooler, MeanPooler, Pooler


def padded(pooler: Pooler, texts: list[np.ndarray], side: str, junk: float = 99.0) -> np.ndarray:
    """The texts pooled in one batch, with junk on the padding of one side."""
    longest = max(map(len, texts)) + 2
    states, mask = np.full((len(texts), longest, *texts[0].shape[1:]), junk), np.zeros((len(texts), longest))
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        states[row, where], mask[row, where] = text, 1
    with torch.no_grad():
        return pooler(torch.from_numpy(states), torch.from_numpy(mask)).numpy()


@pytest.mark.parametrize("side", ["left", "right"])
def test_definition(side: str) -> None:
    random = np.random.default_rng(0)
    texts = [random.normal(size=(length, 6)) for length in (5, 1, 3)]
    pooler = AttentionPooler(6, heads=2).double()
    queries = random.normal(size=(2, 3))
    pooler.queries.data = torch.from_numpy(queries)
    expected = []
    for text in texts:
        parts = []
        for head in (0, 1):
            slices = text[:, 3 * head : 3 * head + 3]
            weights = np.exp(slices @ queries[head] / np.sqrt(3))
            parts.append(weights / weights.sum() @ slices)
        expected.append(np.concatenate(parts))
    for junk in (99.0, np.inf, np.nan):
        np.testing.assert_allclose(padded(pooler, texts, side, junk), expected, rtol=1e-12)


def test_begins_as_the_mean_and_learns() -> None:
    states, mask = torch.randn(2, 4, 6, dtype=torch.float64), torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    pooler = AttentionPooler(6, heads=3).double()
    torch.testing.assert_close(pooler(states, mask), MeanPooler()(states, mask))
    states.requires_grad_()
    given = states, torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, q: functional_call(pooler, {"queries": q}, (x, mask)), given, fast_mode=True
    )


def test_a_text_without_tokens_is_zero_and_its_gradient_finite() -> None:
    pooler = AttentionPooler(4, heads=2)
    found = pooler(torch.randn(2, 3, 4), torch.tensor([[0, 0, 0], [1, 1, 0]]))
    assert not found[0].any()
    found.sum().backward()
    assert pooler.queries.grad is not None
    assert torch.isfinite(pooler.queries.grad).all()


def test_heads_must_divide() -> None:
    with pytest.raises(InputError, match="5 heads do not divide a state of 6"):
        AttentionPooler(6, heads=5)
