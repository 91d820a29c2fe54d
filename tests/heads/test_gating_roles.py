"""Roles of heads by learned gates, on a model whose heads help, hurt and do nothing by construction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import nn

from polyhead.errors import InputError
from polyhead.heads.gating_roles import CausalHeadGating, GatingRoles
from polyhead.heads.tasks import Batch, FunctionTask, Task
from polyhead.model import HeadedModel, load


def planted() -> HeadedModel:
    """One layer: head 0 writes into feature 0, head 1 into feature 1, head 2 into both, head 3 nowhere."""
    module = tiny("gpt2", n_layer=1)
    block, values = module.h[0], 64
    module.ln_f = nn.Identity()
    block.mlp.c_proj.weight.data.zero_()
    for projection in (block.attn.c_attn, block.attn.c_proj):
        projection.weight.data[:, values if projection is block.attn.c_attn else 0 :] = 0
    block.attn.c_attn.bias.data[values:] = 1.0  # every head gives ones at every token
    block.attn.c_proj.bias.data.zero_()
    for head, feature in ((0, 0), (1, 1), (2, 0), (2, 1)):
        block.attn.c_proj.weight.data[8 * head : 8 * head + 8, feature] = 1.0
    return load(module)


def task_on(signs: tuple[float, float]) -> Task:
    """The loss falls with feature 0 and with feature 1 by these signs, within bounds."""
    ids = torch.randint(3, 98, (4, 5), generator=torch.Generator().manual_seed(0))

    def predict(outputs: Any, batch: Batch) -> torch.Tensor:
        return sum(sign * torch.tanh(outputs[0][:, -1, i] / 8) for i, sign in enumerate(signs))  # type: ignore

    return FunctionTask([Batch({"input_ids": ids[:2]}, {}, 2), Batch({"input_ids": ids[2:]}, {}, 2)], predict)


@pytest.fixture(scope="module")
def roles() -> GatingRoles:
    return CausalHeadGating(steps=25, rate=0.5).roles(planted(), task_on((1.0, -1.0)))


def test_helpful_harmful_and_idle_heads_are_told_apart(roles: GatingRoles) -> None:
    assert roles.facilitating[0, 0] > 0.8
    assert roles.facilitating[0, [1, 3]].max() < 0.2
    assert roles.interfering[0, 1] > 0.8
    assert roles.interfering[0, [0, 3]].max() < 0.2
    assert roles.irrelevant[0, 3] > 0.8
    assert roles.irrelevant[0, :2].max() < 0.2


def test_roles_follow_from_the_gates(roles: GatingRoles) -> None:
    np.testing.assert_array_equal(roles.facilitating, roles.drop)
    np.testing.assert_array_equal(roles.interfering, 1 - roles.keep)
    np.testing.assert_array_equal(roles.irrelevant, roles.keep * (1 - roles.drop))
    assert {name: len(losses) for name, losses in roles.losses.items()} == {"free": 25, "keep": 25, "drop": 25}
    assert roles.losses["free"][-1] < roles.losses["free"][0]


def test_the_contrast_finds_the_head_of_one_task_alone() -> None:
    first, second = task_on((1.0, 0.0)), task_on((0.0, 1.0))
    plain = CausalHeadGating(steps=25, rate=0.5).roles(planted(), first)
    contrast = CausalHeadGating(steps=25, rate=0.5, suppress=second).roles(planted(), first)
    assert plain.irrelevant[0, 1] > 0.8  # the other task's head does not matter to the first
    assert contrast.interfering[0, 1] > 0.8  # but it does to the difference
    assert contrast.facilitating[0, 0] > 0.8


def test_weights_and_marks_stay_and_seeds_repeat() -> None:
    model = planted()
    before = {name: parameter.clone() for name, parameter in model.module.named_parameters()}
    score = CausalHeadGating(steps=3, role="interfering")
    assert score.score(model, task_on((1.0, 1.0))) == score.score(model, task_on((1.0, 1.0)))
    for name, parameter in model.module.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert parameter.requires_grad


def test_other_data_and_roles_are_refused() -> None:
    with pytest.raises(InputError, match="expected a Task"):
        CausalHeadGating().score(planted(), ["text"])
    with pytest.raises(InputError, match="expected one of facilitating"):
        CausalHeadGating(role="helpful").score(planted(), task_on((1.0, 1.0)))  # type: ignore[arg-type]
