"""Generalised sum pooling against the paper's fixed point, run to its end text by text; its gradient; its loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyhead.errors import InputError
from polyhead.pooling import GeneralizedSumPooler, MeanPooler, ZeroShotPrototypeLoss

MASK = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]])


def by_hand(pooler: GeneralizedSumPooler, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pooled vector, weights and histogram of one text: the iteration of the paper, then the plan it gives."""
    unit = text / np.linalg.norm(text, axis=1, keepdims=True)
    prototypes = pooler.prototypes.detach().numpy()
    prototypes = prototypes / np.linalg.norm(prototypes, axis=1, keepdims=True)
    costs = ((prototypes[:, None] - unit[None]) ** 2).sum(-1)
    kernel = np.exp(-pooler.gamma * costs)
    column, share, t = kernel.sum(0), 1 / len(text), pooler.mass
    for _ in range(20_000):
        left = share / (1 + t * column)
        t = pooler.mass / (left * column).sum()
    plan = t * kernel * left
    weights = (share - left) / pooler.mass
    return weights @ text, weights, plan.sum(1) / pooler.mass


def made(**options: float) -> tuple[GeneralizedSumPooler, torch.Tensor]:
    torch.manual_seed(0)
    pooler = GeneralizedSumPooler(4, count=3, **{"mass": 0.4, "gamma": 2.0, **options}).double()
    return pooler, torch.randn(2, 5, 4, dtype=torch.float64)


@pytest.mark.parametrize("mass", [0.1, 0.4, 0.9])
def test_definition(mass: float) -> None:
    pooler, states = made(mass=mass)
    pooled = pooler(states, MASK).detach().numpy()
    weights, histogram = (each.detach().numpy() for each in pooler.shares(states, MASK == 1))
    for row, kept in enumerate((slice(0, 4), slice(2, 5))):
        expected = by_hand(pooler, states[row, kept].numpy())
        np.testing.assert_allclose(pooled[row], expected[0], rtol=1e-9)
        np.testing.assert_allclose(weights[row, kept], expected[1], rtol=1e-9)
        np.testing.assert_allclose(histogram[row], expected[2], rtol=1e-9)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(histogram.sum(1), 1)


def test_all_the_mass_is_the_mean() -> None:
    pooler, states = made(mass=1.0)
    torch.testing.assert_close(pooler(states, MASK), MeanPooler()(states, MASK))
    nearly, _ = made(mass=1 - 1e-9)
    torch.testing.assert_close(nearly(states, MASK), MeanPooler()(states, MASK), rtol=1e-6, atol=1e-6)


def test_closed_gradient() -> None:
    pooler, states = made()

    def weights(x: torch.Tensor, prototypes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pooler._parameters["prototypes"] = prototypes
        return pooler.shares(x, MASK == 1)

    prototypes = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weights, (states.requires_grad_(), prototypes), fast_mode=True)


def test_sharp_and_far_in_single_precision() -> None:
    pooler, states = made(gamma=500.0, mass=0.25)
    weights, _ = pooler.float().shares(states.float(), torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    # A quarter of five tokens: one goes whole, one in part, three stay.
    assert ((weights > 1e-3).sum(1) == 2).all()


def test_zero_shot_loss_by_hand() -> None:
    torch.manual_seed(1)
    loss = ZeroShotPrototypeLoss(5, dim=3).double()
    shares, labels = torch.rand(6, 4, dtype=torch.float64), torch.tensor([0, 3, 4, 0, 3, 4])
    classes, values = loss.classes.detach().numpy(), []
    for known in ([0, 3], [1, 2, 4, 5]):
        z, y = shares.numpy()[known], classes[labels.numpy()[known]]
        mapping = np.linalg.solve(z.T @ z + 0.05 * np.eye(4), z.T @ y)
        for row in sorted(set(range(6)) - set(known)):
            scores = 9.5 * classes @ (shares.numpy()[row] @ mapping)
            values.append(np.log(np.exp(scores).sum()) - scores[labels[row]])
    assert loss(shares, labels).item() == pytest.approx(np.mean(values))
    shares.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), shares, fast_mode=True)


def test_refused() -> None:
    with pytest.raises(InputError, match="mass = 0"):
        GeneralizedSumPooler(4, mass=0.0)
    with pytest.raises(InputError, match="one class"):
        ZeroShotPrototypeLoss(3)(torch.rand(2, 4), torch.tensor([1, 1]))
