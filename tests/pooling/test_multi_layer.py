"""Multi-layers trainable pooling against its formula in float64, and which layers it can see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyhead.errors import InputError
from polyhead.pooling import MultiLayerPooler


def norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def by_hand(pooler: MultiLayerPooler, text: np.ndarray) -> np.ndarray:
    """The pooled vector of one text ``[tokens, layers + 1, dim]``."""
    w = {name: value.detach().numpy() for name, value in pooler.state_dict().items()}
    rows = text[-1] if pooler.pooling == "last" else text.mean(0)
    rows = norm(rows + w["layer"] if pooler.weigh == "add" else rows * w["layer"], w, "read_norm")
    size = pooler.dim // pooler.heads
    outputs = []
    for latent in w["queries"]:
        query = w["query.weight"] @ norm(latent, w, "query_norm")
        read = []
        for head in range(pooler.heads):
            part = slice(head * size, (head + 1) * size)
            weights = np.exp(rows @ w["key.weight"][part].T @ query[part] / np.sqrt(size))
            read.append(weights / weights.sum() @ (rows @ w["value.weight"][part].T))
        given = w["mix.weight"] @ np.concatenate(read) + latent
        hidden = w["network.0.weight"] @ norm(given, w, "network_norm") + w["network.0.bias"]
        hidden = torch.nn.functional.gelu(torch.from_numpy(hidden)).numpy()
        outputs.append(given + w["network.2.weight"] @ hidden + w["network.2.bias"])
    return np.mean(outputs, axis=0)


@pytest.mark.parametrize("weigh", ["add", "multiply"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_definition(weigh: str, pooling: str) -> None:
    torch.manual_seed(0)
    pooler = MultiLayerPooler(2, 6, latents=3, heads=2, pooling=pooling, weigh=weigh, hidden=5).double()
    for weight in pooler.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    states, mask = torch.randn(2, 4, 3, 6, dtype=torch.float64), torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    expected = [by_hand(pooler, states[0, :3].numpy()), by_hand(pooler, states[1, 2:].numpy())]
    np.testing.assert_allclose(pooler(states, mask).detach().numpy(), expected, rtol=1e-10)


def test_every_layer_is_seen() -> None:
    states = torch.randn(1, 2, 3, 8, requires_grad=True)
    MultiLayerPooler(2, 8, latents=2, heads=2)(states, torch.ones(1, 2)).square().sum().backward()
    assert (states.grad.abs().sum((0, 1, 3)) > 1e-6).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 5}, "5 heads do not divide"),
        ({"heads": 2, "weigh": "divide"}, "expected 'add' or 'multiply'"),
        ({"heads": 2, "pooling": "median"}, "'median' is not known"),
    ],
)
def test_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MultiLayerPooler(2, 8, **arguments)
    with pytest.raises(InputError, match=r"expected \[batch, tokens, 3, 8\]"):
        MultiLayerPooler(2, 8)(torch.zeros(1, 2, 2, 8), torch.ones(1, 2))
