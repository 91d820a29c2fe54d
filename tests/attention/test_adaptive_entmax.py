"""Entmax against the entmax package, its limits and finite differences; the layer against its definition."""

from __future__ import annotations

import entmax as peer
import pytest
import torch

from polyhead.attention import AttentionShape, register
from polyhead.attention.adaptive_entmax import EntmaxAttention, density, disagreement, entmax, entmax15
from polyhead.errors import InputError
from tests.attention.cases import Case

SHAPE = AttentionShape(32, 4, kv_heads=2)
CASES = {
    "adaptive-entmax": Case(lambda causal: EntmaxAttention(SHAPE, causal=causal)),
    "adaptive-entmax-1.5": Case(lambda causal: EntmaxAttention(SHAPE, causal=causal, alpha=1.5)),
}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("alpha", [1.05, 1.3, 1.5, 1.8, 2.0])
def test_values_and_gradients_of_the_package(alpha: float, spread: float) -> None:
    logits = (spread * randn(7, 60)).requires_grad_()
    wanted = peer.entmax15(logits) if alpha == 1.5 else peer.entmax_bisect(logits, alpha, n_iter=80)
    found, seed = entmax(logits, alpha), randn(60, 7).T
    assert torch.allclose(found, wanted, atol=1e-9)
    assert torch.allclose(entmax(logits.float(), alpha), wanted.float(), atol=5e-6)
    (theirs,) = torch.autograd.grad(wanted, logits, seed)
    (own,) = torch.autograd.grad(found, logits, seed)
    assert torch.allclose(own, theirs, atol=1e-6)


def test_float32_at_one_and_a_half_is_the_package_to_a_millionth() -> None:
    for spread in (0.1, 1, 4):
        logits = spread * randn(50, 512).float()
        assert (entmax15(logits) - peer.entmax15(logits)).abs().max() < 1e-6


@pytest.mark.parametrize("case", [torch.zeros(1, 4096), torch.tensor([[9.0, 9, 9, 0]]), torch.tensor([[3.0]])])
def test_ties_and_long_rows(case: torch.Tensor) -> None:
    best = (case == case.max()).float()
    assert torch.allclose(entmax15(case), best / best.sum(), atol=1e-6)
    assert torch.allclose(entmax(case, torch.tensor([1.7])), best / best.sum(), atol=1e-6)


def test_limits_are_softmax_and_the_simplex_projection() -> None:
    logits = randn(5, 9)
    assert torch.allclose(entmax(logits, torch.tensor([1.0])), logits.softmax(-1), atol=1e-3)
    assert torch.equal(entmax(logits, 1), logits.softmax(-1))
    near = entmax(logits, 2)
    for row, found in zip(logits, near, strict=True):
        ordered = row.sort(descending=True).values
        sums = ordered.cumsum(0)
        count = int((1 + torch.arange(1, 10) * ordered > sums).sum())
        assert torch.allclose(found, (row - (sums[count - 1] - 1) / count).clamp_min(0), atol=1e-10)


def test_gradients_in_logits_and_alpha() -> None:
    logits, alpha = randn(2, 3, 6).requires_grad_(), torch.tensor([1.2, 1.5, 1.9], dtype=torch.float64)[:, None]
    assert torch.autograd.gradcheck(entmax, (logits, alpha.requires_grad_()), atol=1e-5)
    assert torch.autograd.gradcheck(entmax15, (logits,), atol=1e-5)
    (own,) = torch.autograd.grad(entmax(logits, alpha).square().sum(), alpha)
    (theirs,) = torch.autograd.grad(peer.entmax_bisect(logits, alpha[None], n_iter=80).square().sum(), alpha)
    assert torch.allclose(own, theirs, atol=1e-6)


def test_heads_have_alphas_of_their_own() -> None:
    layer, hidden = EntmaxAttention(SHAPE, causal=True).double(), 6 * randn(2, 7, 32)
    layer.sharpness.data = torch.tensor([-3.0, 0.0, 1.0, 4.0], dtype=torch.float64)
    q, k = layer.split(layer.q_proj(hidden)), layer.split(layer.k_proj(hidden))
    weights = layer.attention_weights(hidden)
    for head, sharpness in enumerate((-3.0, 0.0, 1.0, 4.0)):
        alpha = 1 + 1 / (1 + torch.exp(torch.tensor(-sharpness, dtype=torch.float64)))
        for at in range(7):
            row = k[0, head // 2, : at + 1] @ q[0, head, at] / 8**0.5
            wanted = peer.entmax_bisect(row, alpha, n_iter=80)
            assert torch.allclose(weights[0, head, at, : at + 1], wanted, atol=1e-8)
    assert (weights[..., 0, 1:] == 0).all()


def test_density_and_disagreement() -> None:
    apart = torch.eye(2)[None, :, None, :]
    assert disagreement(apart).item() == pytest.approx(0.6931, abs=1e-4)
    assert disagreement(apart[:, :1].expand(1, 2, 1, 2)).item() == pytest.approx(0, abs=1e-6)
    assert density(apart).tolist() == [0.5, 0.5]


def test_a_fixed_alpha_registers_and_others_are_refused() -> None:
    assert register(EntmaxAttention(None, alpha=1.5)) == "polyhead_adaptive_entmax"
    for wrong in (0.5, 3.0, "soft"):
        with pytest.raises(InputError, match="expected 'learn'"):
            EntmaxAttention(SHAPE, alpha=wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="without a shape"):
        EntmaxAttention(None)
    with pytest.raises(InputError, match="sparsemax"):
        entmax(randn(3), 2.5)
    with pytest.raises(InputError, match="last axis of 1"):
        entmax(randn(3), torch.tensor([1.5, 1.6]))
