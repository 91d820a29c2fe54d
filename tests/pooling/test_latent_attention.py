"""NV-Embed's latent attention against its formula, text by text and head by head in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyhead.errors import InputError
from polyhead.pooling import LatentAttentionPooler


def by_hand(pooler: LatentAttentionPooler, text: np.ndarray) -> np.ndarray:
    """The pooled vector of one text ``[tokens, dim]``."""
    array = {name: value.detach().numpy() for name, value in pooler.state_dict().items()}
    head_dim = pooler.dim // pooler.heads
    pooled = []
    for token in text:
        read = []
        for head in range(pooler.heads):
            rows = slice(head * head_dim, (head + 1) * head_dim)
            query = array["query.weight"][rows] @ token
            keys, values = (array["array"] @ array[f"{name}.weight"][rows].T for name in ("key", "value"))
            weights = np.exp(keys @ query / np.sqrt(head_dim))
            read.append(weights / weights.sum() @ values)
        seen = array["mix.weight"] @ np.concatenate(read) + pooler.residual * token
        hidden = torch.from_numpy(array["network.0.weight"] @ seen + array["network.0.bias"])
        out = array["network.2.weight"] @ torch.nn.functional.gelu(hidden).numpy() + array["network.2.bias"]
        pooled.append(out + pooler.residual * seen)
    return np.mean(pooled, axis=0)


@pytest.mark.parametrize("residual", [True, False])
def test_definition(residual: bool) -> None:
    torch.manual_seed(0)
    pooler = LatentAttentionPooler(6, latents=5, heads=2, hidden=7, residual=residual).double()
    states, mask = torch.randn(2, 4, 6, dtype=torch.float64), torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    found = pooler(states, mask).detach().numpy()
    expected = [by_hand(pooler, states[0, :3].numpy()), by_hand(pooler, states[1, 2:].numpy())]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    # The prompt's tokens are left out of the mean.
    skipped = pooler(states, mask, 1).detach().numpy()
    np.testing.assert_allclose(skipped[0], by_hand(pooler, states[0, 1:3].numpy()), rtol=1e-12)


def test_heads_must_divide() -> None:
    with pytest.raises(InputError, match="4 heads do not divide a state of 6"):
        LatentAttentionPooler(6, heads=4)
