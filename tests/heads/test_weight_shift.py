"""Shift of weights: by the definition in SciPy, and on a model of which one head was moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance
from tiny import tiny

from polyhead.errors import InputError
from polyhead.heads.weight_shift import WeightShift
from polyhead.model import load


def test_only_the_head_that_moved_has_a_distance() -> None:
    base, tuned = load(tiny("bert")), load(tiny("bert"))
    tuned.attention_layers[1].module.query.weight.data[16:24] += torch.linspace(0, 1, 32)  # head 2
    for distance in ("wasserstein", "js", "cosine"):
        values = WeightShift(distance).score(base, tuned).values  # type: ignore[arg-type]
        assert values[1, 2] > 1e-9
        assert np.abs(np.delete(values.ravel(), 6)).max() < 1e-12


def test_a_shared_key_moves_all_heads_of_its_group() -> None:
    base, tuned = load(tiny("llama")), load(tiny("llama"))
    tuned.attention_layers[0].module.k_proj.weight.data[8:] *= 3  # key-value head 1, of query heads 2 and 3
    values = WeightShift().score(base, tuned).values
    assert (values[0] > 1e-9).tolist() == [False, False, True, True]


def test_distances_are_scipys() -> None:
    base, tuned = load(tiny("bert")), load(tiny("bert"))
    attention = tuned.attention_layers[0].module
    for part in (attention.query, attention.key, attention.value):
        part.weight.data += 0.3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))

    def flat(model: object, head: int) -> np.ndarray:
        module = model.attention_layers[0].module  # type: ignore[attr-defined]
        rows = slice(8 * head, 8 * head + 8)
        parts = [
            part.weight[rows].detach().double().numpy().ravel() for part in (module.query, module.key, module.value)
        ]
        return np.concatenate(parts)

    for head in range(4):
        a, b = flat(base, head), flat(tuned, head)
        p, q = (np.exp(x) / np.exp(x).sum() for x in (a, b))
        expected = {
            "wasserstein": wasserstein_distance(p, q),
            "js": jensenshannon(p, q) ** 2,
            "cosine": 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b),
        }
        for distance, value in expected.items():
            found = WeightShift(distance).score(base, tuned).values[0, head]  # type: ignore[arg-type]
            assert found == pytest.approx(value, rel=1e-6)


def test_other_shapes_and_no_model_are_refused() -> None:
    with pytest.raises(InputError, match="expected the tuned model"):
        WeightShift().score(load(tiny("bert")))
    with pytest.raises(InputError, match="of one shape"):
        WeightShift().score(load(tiny("bert")), load(tiny("bert", num_hidden_layers=3)))
    with pytest.raises(InputError, match="expected one of wasserstein"):
        WeightShift("euclid").score(load(tiny("bert")), load(tiny("bert")))  # type: ignore[arg-type]
