"""GGeM against its formula in float64, and its limits: GeM, the mean, the maximum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyhead.errors import InputError
from polyhead.pooling import GGeMPooler

MASK = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])


def texts(positive: bool) -> tuple[torch.Tensor, list[np.ndarray]]:
    torch.manual_seed(0)
    states = torch.randn(2, 4, 6, dtype=torch.float64)
    states = states.abs() + 0.1 if positive else states
    return states, [states[0, :3].numpy(), states[1, 1:].numpy()]


def by_hand(text: np.ndarray, exponents: np.ndarray, signed: str) -> np.ndarray:
    pooled = []
    for channel, values in enumerate(text.T):
        p = exponents[channel // (text.shape[1] // len(exponents))]
        if signed == "clamp":
            pooled.append(np.mean(np.maximum(values, 1e-6) ** p) ** (1 / p))
        elif signed == "shift":
            least = values.min() - 1e-6
            pooled.append(np.mean((values - least) ** p) ** (1 / p) + least)
        else:
            mean = np.mean(np.sign(values) * np.abs(values) ** p)
            pooled.append(np.sign(mean) * np.abs(mean) ** (1 / p))
    return np.array(pooled)


@pytest.mark.parametrize("signed", ["clamp", "shift", "power"])
@pytest.mark.parametrize("groups", [1, 3, 6])
def test_definition(signed: str, groups: int) -> None:
    states, alone = texts(positive=False)
    pooler = GGeMPooler(6, groups, signed=signed).double()
    exponents = np.linspace(1.2, 4.0, groups)
    pooler.exponents.data = torch.from_numpy(exponents)
    expected = [by_hand(text, exponents, signed) for text in alone]
    np.testing.assert_allclose(pooler(states, MASK).detach().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("signed", ["clamp", "shift", "power"])
def test_limits(signed: str) -> None:
    states, alone = texts(positive=True)
    mean = GGeMPooler(6, 2, p=1.0, signed=signed).double()(states, MASK).detach().numpy()
    np.testing.assert_allclose(mean, [text.mean(0) for text in alone], rtol=1e-9)
    largest = GGeMPooler(6, 2, p=2000.0, signed=signed).double()(states, MASK).detach().numpy()
    np.testing.assert_allclose(largest, [text.max(0) for text in alone], rtol=2e-3)


def test_large_states_do_not_overflow() -> None:
    states = torch.full((1, 3, 2), 1e20)
    for signed in ("clamp", "shift", "power"):
        found = GGeMPooler(2, p=6.0, signed=signed)(states, torch.ones(1, 3))
        torch.testing.assert_close(found, torch.full((1, 2), 1e20), rtol=1e-4, atol=0.0)


def test_exponents_are_learned_towards_what_helps() -> None:
    states, _ = texts(positive=True)
    pooler = GGeMPooler(6, 2, p=2.0).double()
    optimizer = torch.optim.Adam(pooler.parameters(), lr=0.3)
    means = torch.stack([states[0, :3, 3:].mean(0), states[1, 1:, 3:].mean(0)])
    # The first half of the channels asks for the maximum, the second for the mean.
    target = torch.cat([states.masked_fill(MASK[..., None] == 0, 0).amax(1)[:, :3], means], 1)
    for _ in range(60):
        found = pooler(states, MASK)
        loss = (found - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first, second = pooler.exponents.tolist()
    assert first > 5
    assert second == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"groups": 4}, "4 groups do not divide"), ({"p": 0.0}, "p = 0.0"), ({"signed": "abs"}, "signed = 'abs'")],
)
def test_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GGeMPooler(6, **arguments)
