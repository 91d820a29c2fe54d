"""Low-rank multi-head pooling against explicit bilinear heads in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyhead.errors import InputError
from polyhead.pooling import LowRankPooler, redundancy

MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])


def by_hand(pooler: LowRankPooler, text: np.ndarray) -> np.ndarray:
    """The matrix of one text ``[tokens, dim]``, from ``W_k`` written out."""
    left, right = (each.detach().numpy() for each in (pooler.left, pooler.right))
    context = {"mean": text.mean(0), "cls": text[0], "last": text[-1]}[pooler.context]
    scores = np.empty((len(text), pooler.heads))
    for head in range(pooler.heads):
        columns = range(head * pooler.rank, (head + 1) * pooler.rank)
        matrix = sum(np.outer(left[:, column], right[:, column]) for column in columns)
        scores[:, head] = text @ (context @ matrix)
    if pooler.squash:
        scores = np.tanh(scores)
        scores /= np.linalg.norm(scores, axis=1, keepdims=True)
    weights = np.exp(scores) / np.exp(scores).sum(0)
    return weights.T @ text


@pytest.mark.parametrize(("rank", "context", "squash"), [(1, "mean", True), (3, "cls", True), (2, "last", False)])
def test_definition(rank: int, context: str, squash: bool) -> None:
    torch.manual_seed(0)
    pooler = LowRankPooler(6, heads=4, rank=rank, context=context, squash=squash).double()
    states = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = [by_hand(pooler, states[0, :3].numpy()), by_hand(pooler, states[1, 2:].numpy())]
    np.testing.assert_allclose(pooler(states, MASK).detach().numpy(), expected, rtol=1e-10)


def test_weights_are_shared_factors() -> None:
    pooler = LowRankPooler(384, heads=8)
    assert sum(weight.numel() for weight in pooler.parameters()) == 2 * 8 * 384
    assert pooler(torch.randn(2, 3, 384), torch.ones(2, 3)).shape == (2, 8, 384)
    assert pooler.output_dim(384) == 8 * 384


def test_redundancy_is_least_where_heads_part() -> None:
    apart = torch.eye(3)[None, :, :].repeat(2, 1, 1)
    assert redundancy(apart).item() == 0
    alike = torch.full((1, 2, 4), 0.25)
    # A A^T is 1/4 everywhere: off the identity by 3/4 twice and 1/4 twice.
    assert redundancy(alike).item() == pytest.approx((2 * 0.75**2 + 2 * 0.25**2) ** 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"), [({"context": "max"}, "context = 'max'"), ({"heads": 0}, "0 heads of rank 1")]
)
def test_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LowRankPooler(6, **arguments)
