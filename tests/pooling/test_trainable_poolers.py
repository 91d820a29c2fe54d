"""Every pooler with weights: padding of any content on any side, gradients, saving, empty texts, half precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from polyhead.pooling import (
    AttentionPooler,
    GeneralizedSumPooler,
    GGeMPooler,
    LatentAttentionPooler,
    LowRankPooler,
    MultiLayerPooler,
    Pooler,
    WeightedLayersPooler,
    load_pooler,
)

DIM = 8
CASES: dict[str, Callable[[], Pooler]] = {
    "attention": lambda: AttentionPooler(DIM, 2),
    "weighted layers": lambda: WeightedLayersPooler(2),
    "latent attention": lambda: LatentAttentionPooler(DIM, latents=4, heads=2, hidden=6),
    "multi-layer": lambda: MultiLayerPooler(2, DIM, latents=3, heads=2, hidden=6),
    "ggem clamp": lambda: GGeMPooler(DIM, 2),
    "ggem shift": lambda: GGeMPooler(DIM, 4, p=2.0, signed="shift"),
    "ggem power": lambda: GGeMPooler(DIM, 2, p=2.0, signed="power"),
    "generalized sum": lambda: GeneralizedSumPooler(DIM, count=3, mass=0.4, gamma=2.0),
    "low rank": lambda: LowRankPooler(DIM, heads=3, rank=2, context="last"),
}


@pytest.fixture(params=sorted(CASES))
def pooler(request: pytest.FixtureRequest) -> Pooler:
    """A pooler in float64, its weights moved away from where they begin."""
    torch.manual_seed(2)
    made = CASES[request.param]().double()
    for weight in made.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return made


def some_states(pooler: Pooler, *shape: int) -> torch.Tensor:
    torch.manual_seed(3)
    wide = {"tokens": (DIM,), "layers": (3, DIM), "heads": (2, 2, DIM // 2)}[pooler.reads]
    return torch.randn(*shape, *wide, dtype=torch.float64)


def test_padding_changes_nothing(pooler: Pooler) -> None:
    states = some_states(pooler, 1, 3)
    alone = pooler(states, torch.ones(1, 3))
    for before, after, junk in ((0, 2, 1e4), (2, 0, float("nan")), (1, 1, float("inf"))):
        padded = torch.full((2, 5, *states.shape[2:]), junk, dtype=torch.float64)
        padded[0, before : before + 3] = states[0]
        padded[1] = some_states(pooler, 1, 5)[0]
        mask = torch.ones(2, 5)
        mask[0] = torch.tensor([0] * before + [1] * 3 + [0] * after)
        torch.testing.assert_close(pooler(padded, mask)[0], alone[0], rtol=1e-10, atol=1e-12)


def test_gradients(pooler: Pooler) -> None:
    states, mask = some_states(pooler, 2, 4).requires_grad_(), torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda x: pooler(x, mask), states, fast_mode=True)
    pooler(states, mask).square().sum().backward()
    for name, weight in pooler.named_parameters():
        assert weight.grad is not None, name
        assert torch.isfinite(weight.grad).all(), name
        assert weight.grad.any(), name
    with torch.no_grad():
        step = 1e-6
        for weight in pooler.parameters():
            given = weight.grad.flatten()[0].item()  # type: ignore[union-attr]
            values = []
            for sign in (1, -1):
                weight.view(-1)[0] += sign * step
                values.append(pooler(states, mask).square().sum().item())
                weight.view(-1)[0] -= sign * step
            assert (values[0] - values[1]) / (2 * step) == pytest.approx(given, rel=1e-4, abs=1e-6)


def test_saved_and_loaded(pooler: Pooler, tmp_path: Path) -> None:
    pooler.save(tmp_path)
    again = load_pooler(tmp_path)
    states, mask = some_states(pooler, 2, 4).float(), torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert again.settings() == pooler.settings()
    torch.testing.assert_close(again(states, mask), pooler.float()(states, mask))
    assert again(states, mask).flatten(1).shape[1] == again.output_dim(DIM)


def test_a_text_without_tokens_is_zero(pooler: Pooler) -> None:
    states, mask = some_states(pooler, 2, 4), torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]])
    found = pooler(states, mask)
    assert not found[0].any()
    found.sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in pooler.parameters() if weight.grad is not None)


def test_half_precision(pooler: Pooler) -> None:
    pooler = pooler.float()
    states, mask = some_states(pooler, 2, 4), torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    found = pooler(states.bfloat16(), mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, pooler(states.bfloat16().float(), mask))
