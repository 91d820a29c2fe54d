"""Blocks and two passes give what the whole gives, in less memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polyhead.errors import InputError
from polyhead.objectives import (
    FalseNegativeMask,
    InfoNCE,
    LargeBatchInfoNCE,
    Objective,
    Relation,
    Symmetric,
    cached_step,
)


def vectors(n, seed=0, dim=6):
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("margin", [None, -0.2])
@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("doubles", [False, True])
def test_blocks_equal_the_whole_matrix(symmetric, margin, extra, doubles):
    x, y = vectors(11), vectors(11 + extra, 1)
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 9, 10, 3, 3, 11, 12, 13][: len(y)]) if doubles else None
    relation = Relation.diagonal(11, len(y))
    if ids is not None:
        relation = relation.only(negative=ids[:11, None] != ids[None])
    loss = InfoNCE(temperature=0.1)
    similarity = Objective(loss).similarity(x, y)
    if margin is not None:
        mask = FalseNegativeMask(margin=margin)
        rows = mask(similarity.detach(), relation)
        columns = mask(similarity.detach().T, relation.transposed)
        columns = Relation(columns.positive[:11], columns.negative[:11])
    else:
        rows, columns = relation, Relation(relation.positive.T[:11], relation.negative.T[:11])
    whole = loss(similarity, rows)
    if symmetric:
        whole = (whole + loss(similarity.T[:11], columns)) / 2
    blocks = LargeBatchInfoNCE(temperature=0.1, symmetric=symmetric, mask_margin=margin, chunk=4)(x, y, ids)
    assert torch.allclose(blocks, whole)
    for a, b in zip(torch.autograd.grad(blocks * 3, (x, y)), torch.autograd.grad(whole * 3, (x, y)), strict=True):
        assert torch.allclose(a, b)


def test_without_a_mask_it_is_the_objective_and_the_gradient_checks():
    x, y = vectors(7), vectors(7, 1)
    blocks = LargeBatchInfoNCE(symmetric=True, chunk=3)
    assert torch.allclose(blocks(x, y), Objective(Symmetric(InfoNCE()))(x, other=y))
    torch.autograd.gradcheck(LargeBatchInfoNCE(temperature=0.5, symmetric=True, chunk=3), (x, y))
    assert blocks(x.bfloat16(), y.bfloat16()).dtype == torch.float32
    frozen = blocks(x.detach(), y)
    frozen.backward()
    assert y.grad.abs().sum() > 0
    with pytest.raises(InputError, match="m >= n"):
        blocks(y, x[:3])


def test_a_cached_step_is_the_step_of_the_whole_batch():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()

    x, y = vectors(10).detach(), vectors(10, 1).detach()
    objective = Objective(InfoNCE())
    one, two = model(), model()
    whole = objective(one(x), other=one(y))
    whole.backward()
    cached = cached_step(two, [x.split(3), y.split(4)], lambda a, b: objective(a, other=b))
    assert torch.allclose(cached, whole)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad)


def test_a_cached_step_repeats_the_random_numbers_of_its_first_pass():
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    seen = []

    def encode(batch):
        out = model(batch)
        seen.append(out.detach())
        return out

    x = vectors(8).detach().float()
    torch.manual_seed(1)
    cached_step(encode, [x.split(4)], lambda a: a.square().sum())
    after = torch.rand(1)
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])
    assert not torch.equal(seen[0] == 0, seen[1] == 0)
    torch.manual_seed(1)
    model(x[:4])
    model(x[4:])
    assert torch.equal(after, torch.rand(1)), "what follows is as if one pass had been made"


def test_parameters_of_the_objective_get_their_gradient_too():
    scale = nn.Parameter(torch.tensor(2.0))
    model = nn.Linear(6, 3)
    x = vectors(4).detach().float()
    cached_step(model, [x.split(2)], lambda a: (a * scale).square().sum())
    assert scale.grad != 0
