"""Patching heads between clean and corrupt inputs: by hand, where the estimate is exact, and where one head knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import inputs_for, tiny
from torch import nn

from polyhead.errors import InputError
from polyhead.heads.patching import ActivationPatching, AttributionPatching, PatchingData, answer_difference
from polyhead.heads.suffix import every_head
from polyhead.heads.tasks import Batch
from polyhead.model import HeadedModel, load


def metric(outputs: Any, batch: Batch) -> torch.Tensor:
    return outputs[0][:, -1] @ torch.linspace(-1, 2, outputs[0].shape[-1], dtype=outputs[0].dtype)


def pairs(seed: int = 0) -> PatchingData:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, 98, (3, 6), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 2] = torch.randint(3, 98, (3,), generator=generator)
    return PatchingData(
        [Batch({"input_ids": clean[:2]}, {}, 2), Batch({"input_ids": clean[2:]}, {}, 1)],
        [Batch({"input_ids": corrupt[:2]}, {}, 2), Batch({"input_ids": corrupt[2:]}, {}, 1)],
        metric,
    )


def patched_by_hand(model: HeadedModel, run: Batch, source: Batch, layer: int, head: int) -> torch.Tensor:
    with torch.no_grad():
        with model.record("heads") as recording:
            model(**source.inputs)
        wanted = recording.layer_heads(layer)[:, head]

        def put(at: int, z: torch.Tensor) -> torch.Tensor:
            z = z.clone()
            z[:, :, head] = wanted
            return z

        before = metric(model(**run.inputs), run)
        with model.tap_heads(put, layers=[layer]):
            return metric(model(**run.inputs), run) - before


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_exact_patching_equals_patching_by_hand(family: str) -> None:
    model, data = load(tiny(family).double()), pairs()
    restored = ActivationPatching().effects(model, data)
    lost = ActivationPatching(into="clean").effects(model, data)
    assert restored.shape == (2, 4, 3)
    for layer, head in every_head(model):
        for found, run, source, sign in ((restored, data.corrupt, data.clean, 1), (lost, data.clean, data.corrupt, -1)):
            by_hand = [patched_by_hand(model, r, s, layer, head) for r, s in zip(run, source, strict=True)]
            np.testing.assert_allclose(found[layer, head], sign * torch.cat(by_hand).numpy(), atol=1e-6)
    np.testing.assert_allclose(ActivationPatching().score(model, data).values, restored.mean(-1))


@pytest.mark.parametrize("into", ["corrupt", "clean"])
def test_the_estimate_is_exact_where_the_model_is_linear_in_its_heads(into: Any) -> None:
    module = tiny("gpt2", n_layer=1).double()
    module.ln_f = nn.Identity()
    module.h[0].mlp.c_proj.weight.data.zero_()  # what follows the heads is linear now
    model = load(module)
    exact, estimate = (
        ActivationPatching(into).effects(model, pairs()),
        AttributionPatching(into).effects(model, pairs()),
    )
    assert np.abs(exact).max() > 1e-3
    np.testing.assert_allclose(estimate, exact, rtol=1e-6, atol=1e-10)
    whole = ActivationPatching("corrupt").effects(model, pairs())
    np.testing.assert_allclose(ActivationPatching("clean").effects(model, pairs()), whole, rtol=1e-6, atol=1e-10)


def test_the_estimate_is_the_slope_of_patching() -> None:
    model, data = load(tiny("gpt2").double()), pairs()
    found = AttributionPatching().effects(model, data)[:, :, :2]
    run, source = data.corrupt[0], data.clean[0]
    with torch.no_grad(), model.record("heads") as recording:
        model(**source.inputs)
    for layer, head in every_head(model):
        ends = []
        for step in (1e-4, -1e-4):

            def towards(at: int, z: torch.Tensor, step: float = step, layer: int = layer, head: int = head) -> Any:
                z = z.clone()
                z[:, :, head] += step * (recording.layer_heads(layer)[:, head] - z[:, :, head])
                return z

            with torch.no_grad(), model.tap_heads(towards, layers=[layer]):
                ends.append(metric(model(**run.inputs), run))
        slope = ((ends[0] - ends[1]) / 2e-4).numpy()
        np.testing.assert_allclose(found[layer, head], slope, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("score", [ActivationPatching(), AttributionPatching()])
def test_the_one_head_that_sees_the_change_carries_all_of_it(score: Any) -> None:
    module = tiny("gpt2", n_layer=1)
    module.h[0].attn.c_attn.weight.data[:, 64:80] = 0  # values of heads 0 and 1
    module.h[0].attn.c_attn.weight.data[:, 88:] = 0  # and of head 3
    values = score.score(load(module), pairs()).values
    assert abs(values[0, 2]) > 0.01
    assert np.abs(np.delete(values[0], 2)).max() < 1e-5


def test_frozen_models_can_be_estimated_and_stay_as_they_are() -> None:
    model = load(tiny("llama"))
    expected = AttributionPatching().score(model, pairs())
    model.module.requires_grad_(False)
    assert AttributionPatching().score(model, pairs()) == expected
    assert all(parameter.grad is None for parameter in model.module.parameters())


def test_pairs_of_other_shapes_and_other_data_are_refused() -> None:
    short, long = (Batch({"input_ids": torch.zeros(1, n, dtype=torch.long)}, {}, 1) for n in (3, 4))
    with pytest.raises(InputError, match="pairs of one shape"):
        PatchingData([short], [long], metric)
    with pytest.raises(InputError, match="expected PatchingData"):
        ActivationPatching().score(load(tiny("gpt2")), [inputs_for("gpt2")])
    with pytest.raises(InputError, match="'corrupt' or 'clean'"):
        AttributionPatching("both").score(load(tiny("gpt2")), pairs())  # type: ignore[arg-type]


def test_the_answer_difference_is_of_the_last_token() -> None:
    class Outputs:
        logits = torch.arange(24.0).reshape(2, 3, 4) ** 2

    batch = Batch({}, {"answer": torch.tensor([1, 3]), "other": torch.tensor([0, 1])}, 2)
    expected = [9.0**2 - 8.0**2, 23.0**2 - 21.0**2]
    assert answer_difference(Outputs, batch).tolist() == expected
