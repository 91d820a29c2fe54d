"""Poolers against float64 references written from their definitions, padded on either side, with skipped prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyhead.errors import InputError
from polyhead.pooling import POOLERS, pooler_for

LENGTHS = (5, 1, 3)
TOKENS, DIM = 7, 4


def reference(name: str, text: np.ndarray, skip: int) -> np.ndarray:
    """The definition, on one text ``[tokens, dim]`` without padding."""
    positions = np.arange(1, len(text) + 1)[skip:, None]
    kept = text[skip:]
    if len(kept) == 0:
        return np.zeros(text.shape[1])
    return {
        "mean": lambda: kept.mean(0),
        "mean_sqrt_len": lambda: kept.sum(0) / np.sqrt(len(kept)),
        "weighted_mean": lambda: (kept * positions).sum(0) / positions.sum(),
        "max": lambda: kept.max(0),
        "cls": lambda: kept[0],
        "last": lambda: kept[-1],
    }[name]()


def padded(side: str) -> tuple[list[np.ndarray], torch.Tensor, torch.Tensor]:
    """Texts ``[tokens, dim]`` and the batch of them with junk, not zeros, on the padding."""
    random = np.random.default_rng(3)
    texts = [random.normal(size=(length, DIM)) for length in LENGTHS]
    states = np.full((len(texts), TOKENS, DIM), 99.0)
    mask = np.zeros((len(texts), TOKENS), dtype=np.int64)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(TOKENS - len(text), TOKENS)
        states[row, where], mask[row, where] = text, 1
    return texts, torch.from_numpy(states), torch.from_numpy(mask)


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", sorted(POOLERS))
def test_definition(name: str, side: str, skip: int) -> None:
    texts, states, mask = padded(side)
    expected = np.stack([reference(name, text, skip) for text in texts])
    for given in (skip, torch.tensor(skip)):
        np.testing.assert_allclose(pooler_for(name)(states, mask, given).numpy(), expected, rtol=1e-12, atol=1e-12)


def test_half_precision_sums_in_float32() -> None:
    # 4,097 ones: bfloat16 cannot count past 256, so a sum in bfloat16 would be far off.
    states = torch.ones(1, 4097, 1, dtype=torch.bfloat16)
    pooled = pooler_for("mean_sqrt_len")(states, torch.ones(1, 4097))
    assert pooled.dtype == torch.float32
    assert pooled.item() == pytest.approx(4097**0.5, rel=1e-6)


def test_concatenation_keeps_the_order() -> None:
    _, states, mask = padded("left")
    both = pooler_for(["max", "cls"])(states, mask)
    assert torch.equal(both, torch.cat([pooler_for("max")(states, mask), pooler_for("cls")(states, mask)], dim=-1))


def test_gradient_reaches_only_what_is_pooled() -> None:
    _, states, mask = padded("right")
    states.requires_grad_()
    pooler_for("mean")(states, mask, 1).sum().backward()
    assert states.grad is not None
    touched = states.grad.abs().sum(-1) > 0
    positions = torch.arange(TOKENS)
    assert torch.equal(touched, (mask == 1) & (positions >= 1))


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(InputError, match=r"'median'.*mean, cls, last"):
        pooler_for("median")
    with pytest.raises(InputError, match="no names"):
        pooler_for([])
