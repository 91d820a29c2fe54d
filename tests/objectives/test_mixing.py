"""Metrix and mixed hard negatives: what a mixed vector counts for, and that the ends of the mix are the clean loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from polyhead import objectives as o
from polyhead.errors import InputError

LABELS = torch.tensor([0, 0, 1, 1, 2, 0])


def vectors(seed: int = 0, n: int = 6) -> torch.Tensor:
    return torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def generic(x, plan, share):
    """The paper's mixed contrastive loss, pair by pair: share times the positive's hinge, the rest the negative's."""
    pull, push, pulls, pushes = 0.0, 0.0, 0.0, 0.0
    for a, i, j, one in zip(*plan[:3], share, strict=True):
        v = one * x[i] + (1 - one) * x[j]
        s = nn.functional.cosine_similarity(x[a], v, dim=0)
        pull, pulls = pull + one * (0.9 - s).relu(), pulls + one
        push, pushes = push + (1 - one) * (s - 0.1).relu(), pushes + 1 - one
    return pull / pulls + push / pushes


@pytest.mark.parametrize("partner", ["positive", "anchor"])
def test_mixed_pairs_against_the_definition(partner):
    x = vectors()
    loss = o.ContrastiveLoss(pos_margin=0.9, neg_margin=0.1, reduction="mean")
    metrix = o.Metrix(o.Objective(loss), weight=0.4, hardest=2, partner=partner, seed=3)
    plan = metrix.plan(x, LABELS)
    expected = o.Objective(loss)(x, LABELS) + 0.4 * generic(x, plan, plan.share)
    found = metrix(x, LABELS, plan)
    assert torch.allclose(found, expected)
    assert torch.allclose(*(torch.autograd.grad(value, x)[0] for value in (found, expected)))
    partners = (8 if partner == "positive" else 5) * 2
    assert len(plan.anchor) == partners, "every positive pair, or anchor with a positive, times two negatives"
    assert (LABELS[plan.anchor] == LABELS[plan.first]).all()
    assert (LABELS[plan.anchor] != LABELS[plan.second]).all()
    assert ((plan.share > 0) & (plan.share < 1)).all()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_shares_of_one_and_zero_give_the_clean_loss_of_the_partners(share):
    x = vectors()
    objective = o.Objective(o.MultiSimilarityLoss())
    metrix = o.Metrix(objective, weight=1.0, hardest=1)
    plan = metrix.plan(x, LABELS)._replace(share=torch.full((8,), share, dtype=torch.float64))
    similarity, rows = o.CosineSimilarity()(x), plan.first if share else plan.second
    counts = torch.zeros(6, 6).index_put((plan.anchor, rows), torch.ones(8), accumulate=True)
    none = torch.zeros(6, 6)
    relation = o.Relation(counts, none) if share else o.Relation(none, counts)
    assert torch.allclose(metrix(x, LABELS, plan) - objective(x, LABELS), objective.loss(similarity, relation))


def test_proxies_are_mixed_for_all_and_other_levels_by_the_plan():
    x = vectors()
    objective = o.ProxyObjective(o.ProxyAnchorLoss(alpha=4), 3, 5).double()
    metrix = o.Metrix(objective, weight=0.5)
    plan = metrix.plan(x, LABELS)
    assert (LABELS[plan.first] != LABELS[plan.second]).all()
    share = plan.share[:, None]
    positive = share * nn.functional.one_hot(LABELS[plan.first], 3)
    positive = positive + (1 - share) * nn.functional.one_hot(LABELS[plan.second], 3)
    expected = objective(x, LABELS) + 0.5 * objective(plan.mix(x), o.Relation(positive, 1 - positive))
    assert torch.allclose(metrix(x, LABELS, plan), expected)
    encoder = nn.Linear(5, 5).double()
    mixed = encoder(plan.mix(x))
    assert not torch.allclose(metrix(x, LABELS, plan, mixed), expected)
    with pytest.raises(InputError, match="need the plan"):
        metrix(x, LABELS, mixed=mixed)
    with pytest.raises(InputError, match="got 1 mixed"):
        metrix(x, LABELS, plan, mixed[:1])


def test_a_batch_without_partners_is_the_clean_objective():
    x = vectors()
    objective = o.Objective(o.InfoNCE())
    assert o.Metrix(objective)(x, torch.arange(6)) == objective(x, torch.arange(6))
    assert o.Metrix(objective)(x, torch.zeros(6).long()) == objective(x, torch.zeros(6).long())


def test_utilization_is_the_mean_squared_distance_to_the_nearest():
    q, x = vectors(1), vectors(2, 9)
    expected = torch.cdist(q, x).square().amin(1).mean()
    assert torch.allclose(o.utilization(q, x, chunk=4), expected)


@pytest.mark.parametrize("mode", ["pair", "list"])
def test_mixed_negatives_are_unit_vectors_between_theirs(mode):
    anchors = torch.randn(4, 5)
    negatives = torch.randn(4, 3, 5).requires_grad_()
    mixed = o.HardNegativeMixer(mode, count=6)(anchors, negatives)
    assert mixed.shape == (4, 6 if mode == "pair" else 1, 5)
    assert torch.allclose(mixed.norm(dim=-1), torch.ones(mixed.shape[:2]))
    unit = nn.functional.normalize(negatives, dim=-1)
    for row in range(4):
        share = torch.linalg.lstsq(unit[row].T, mixed[row].T).solution
        assert torch.allclose(unit[row].T @ share, mixed[row].T, atol=1e-5), "in the span of its negatives"
        assert (share > -1e-5).all()
        if mode == "pair":
            assert ((share.abs() > 1e-5).sum(0) == 2).all(), "of two different ones"
    mixed.sum().backward()
    assert negatives.grad.isfinite().all()


def test_the_list_leans_to_the_hardest_and_bad_shapes_are_refused():
    anchors = torch.eye(4)[:1]
    negatives = torch.eye(4)[None, :3]
    assert o.HardNegativeMixer("list")(anchors, negatives)[0, 0, 0] > 0.99
    with pytest.raises(InputError, match="k at least 2"):
        o.HardNegativeMixer("pair")(anchors, negatives[:, :1])
    with pytest.raises(InputError, match="'pair' or 'list'"):
        o.HardNegativeMixer("triple")


def test_gamma_zero_is_infonce_and_hard_anchors_weigh_more():
    s = torch.tensor([[0.9, 0.1], [0.3, 0.2]])
    relation = o.Relation.diagonal(2)
    plain, focal = (o.InfoNCE(temperature=0.2, gamma=g).terms(s, relation)[0].values.diagonal() for g in (0.0, 0.5))
    assert torch.allclose(plain, o.InfoNCE(temperature=0.2).terms(s, relation)[0].values.diagonal())
    assert focal[1] / plain[1] > 5 * focal[0] / plain[0]
