"""Values and gradients beside pytorch-metric-learning and sentence-transformers, and definitions written out."""

from __future__ import annotations

import math

import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from sentence_transformers.sentence_transformer import losses as st
from torch import nn

from polyhead import objectives as o
from polyhead.errors import InputError
from polyhead.objectives import Objective, Relation

LABELS = torch.tensor([0, 0, 1, 1, 2, 0, 3, 2, 1, 0])


def vectors(n: int = 10, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def same(ours, theirs, *inputs):
    """Value and gradients to 1e-6, in float64."""
    assert torch.allclose(ours, theirs, atol=1e-6), (ours.item(), theirs.item())
    assert theirs > 0, "a comparison of zeros says nothing"
    pairs = zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


mean = reducers.MeanReducer
PML = {
    "ntxent": (lambda: o.InfoNCE(temperature=0.1), None, lambda: losses.NTXentLoss(temperature=0.1)),
    "supcon": (
        lambda: o.InfoNCE(temperature=0.1, positives="together"),
        None,
        lambda: losses.SupConLoss(temperature=0.1),
    ),
    "triplet": (
        lambda: o.TripletLoss(margin=0.3, reduction="nonzero"),
        lambda: o.EuclideanSimilarity(normalize=True),
        lambda: losses.TripletMarginLoss(margin=0.3),
    ),
    "smooth-triplet": (
        lambda: o.TripletLoss(margin=0.3, smooth=True),
        o.CosineSimilarity,
        lambda: losses.TripletMarginLoss(
            margin=0.3, smooth_loss=True, distance=distances.CosineSimilarity(), reducer=mean()
        ),
    ),
    "contrastive": (
        lambda: o.ContrastiveLoss(pos_margin=-0.2, neg_margin=-1.0),
        lambda: o.EuclideanSimilarity(normalize=True),
        lambda: losses.ContrastiveLoss(pos_margin=0.2, neg_margin=1.0),
    ),
    "contrastive-cosine": (
        lambda: o.ContrastiveLoss(pos_margin=0.9, neg_margin=0.2),
        None,
        lambda: losses.ContrastiveLoss(pos_margin=0.9, neg_margin=0.2, distance=distances.CosineSimilarity()),
    ),
    "multi-similarity": (o.MultiSimilarityLoss, None, losses.MultiSimilarityLoss),
    "snr-contrastive": (
        lambda: o.ContrastiveLoss(pos_margin=-0.1, neg_margin=-1.5),
        o.SNRSimilarity,
        lambda: losses.ContrastiveLoss(
            pos_margin=0.1, neg_margin=1.5, distance=distances.SNRDistance(normalize_embeddings=False)
        ),
    ),
    "nca": (
        lambda: o.ProxyNCALoss(temperature=0.5),
        o.CosineSimilarity,
        lambda: losses.NCALoss(softmax_scale=2, distance=distances.CosineSimilarity()),
    ),
    "dot": (
        lambda: o.InfoNCE(temperature=2.0),
        o.DotProductSimilarity,
        lambda: losses.NTXentLoss(temperature=2.0, distance=distances.DotProductSimilarity(normalize_embeddings=False)),
    ),
}


@pytest.mark.parametrize("name", PML)
def test_equals_pytorch_metric_learning(name):
    loss, similarity, peer = PML[name]
    x = vectors()
    # Anchors without a positive: NCA leaves them out in both; SupCon's average there skips what is 0 with us too.
    objective = Objective(loss(), similarity() if similarity else None)
    same(objective(x, LABELS), peer()(x, LABELS), x)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: o.ProxyNCALoss(temperature=0.25), lambda: losses.ProxyNCALoss(4, 6, softmax_scale=4)),
        (lambda: o.ProxyAnchorLoss(), lambda: losses.ProxyAnchorLoss(4, 6)),
    ],
    ids=["nca", "anchor"],
)
def test_proxies_equal_pytorch_metric_learning(ours, theirs):
    x, peer = vectors(), theirs()
    objective = o.ProxyObjective(ours(), 4, 6).double()
    peer.proxies.data = objective.proxies.data.clone()
    labels = LABELS.clamp(max=2)  # one class is not in the batch
    same(objective(x, labels), peer(x, labels), x)
    (own,) = torch.autograd.grad(objective(x, labels), objective.proxies)
    (other,) = torch.autograd.grad(peer(x, labels), peer.proxies)
    assert torch.allclose(own, other, atol=1e-6)
    for bad in (torch.full((10,), 4), torch.rand(10)):
        with pytest.raises(InputError, match="whole numbers from 0 to 3"):
            objective(x, bad)


@pytest.mark.parametrize("kind", ["semihard", "hard", "all"])
def test_triplets_equal_those_of_the_peer(kind):
    x = vectors()
    similarity = o.EuclideanSimilarity(normalize=True)(x).detach()
    miner = o.TripletMiner("violating" if kind == "all" else kind, margin=0.3, one=False)
    found = miner(similarity, Relation.from_labels(LABELS)).triplets
    expected = torch.stack(miners.TripletMarginMiner(margin=0.3, type_of_triplets=kind)(x, LABELS), 1)
    assert {tuple(row) for row in found.tolist()} == {tuple(row) for row in expected.tolist()}
    assert 0 < len(found) < 10 * 9 * 8


def test_multi_similarity_mining_equals_the_peer():
    x = vectors()
    mined = o.MultiSimilarityMiner(0.1)(o.CosineSimilarity()(x).detach(), Relation.from_labels(LABELS))
    a1, p, a2, n = miners.MultiSimilarityMiner(0.1)(x, LABELS)
    assert {tuple(i) for i in mined.is_positive.nonzero().tolist()} == set(zip(a1.tolist(), p.tolist(), strict=True))
    assert {tuple(i) for i in mined.is_negative.nonzero().tolist()} == set(zip(a2.tolist(), n.tolist(), strict=True))
    objective = Objective(o.MultiSimilarityLoss(), miners=[o.MultiSimilarityMiner(0.1)])
    same(objective(x, LABELS), losses.MultiSimilarityLoss()(x, LABELS, (a1, p, a2, n)), x)


def peer(loss, *arguments, **knobs):
    return loss(nn.Module(), *arguments, **knobs)


def test_semi_hard_mining_equals_sentence_transformers():
    x = vectors()
    theirs = peer(st.BatchSemiHardTripletLoss, margin=0.3)
    objective = Objective(o.TripletLoss(margin=0.3), o.EuclideanSimilarity(), [o.TripletMiner("semihard", margin=0.3)])
    same(objective(x, LABELS), theirs.batch_semi_hard_triplet_loss(LABELS, x), x)


def test_multiple_negatives_equal_sentence_transformers():
    x, y, hard = vectors(), vectors(seed=1), vectors(seed=2)
    theirs = peer(st.MultipleNegativesRankingLoss).compute_loss_from_embeddings([x, y, hard], None)
    same(Objective(o.InfoNCE())(x, other=torch.cat((y, hard))), theirs, x, y, hard)
    both = peer(
        st.MultipleNegativesRankingLoss, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"
    ).compute_loss_from_embeddings([x, y, hard], None)
    same(Objective(o.Symmetric(o.InfoNCE()))(x, other=torch.cat((y, hard))), both, x, y, hard)


@pytest.mark.parametrize("dim", [6, 5])
def test_graded_pairs_equal_sentence_transformers(dim):
    x, y = vectors(dim=dim), vectors(dim=dim, seed=1)
    grades = torch.tensor([0.0, 1, 2, 2, 3, 4, 5, 1, 0, 2], dtype=torch.float64)
    for similarity, theirs in ((o.CosineSimilarity(), st.CoSENTLoss), (o.AngleSimilarity(), st.AnglELoss)):
        ours = Objective(o.CoSENTLoss(), similarity)(x, grades, y)
        same(ours, peer(theirs).compute_loss_from_embeddings([x, y], grades), x, y)


# --- definitions written out ---


def test_graded_loss_against_its_double_sum():
    similarity = torch.rand(6, 1, dtype=torch.float64)
    grades = torch.tensor([0.0, 1.0, 1.0, 3.0, 2.0, 0.0])
    total = 1.0
    for i in range(6):
        for j in range(6):
            if grades[i] > grades[j]:
                total += math.exp(float(similarity[j, 0] - similarity[i, 0]) / 0.1)
    assert math.isclose(
        float(o.CoSENTLoss(temperature=0.1)(similarity, Relation.graded(grades))), math.log(total), rel_tol=1e-6
    )


def test_a_graded_pair_counts_partly_as_each_for_losses_of_pairs():
    relation = Relation.graded(torch.tensor([[0.0, 4.0, float("nan")], [1.0, 5.0, 2.5]]), low=0, high=5)
    assert torch.allclose(relation.positive, torch.tensor([[0.0, 0.8, 0.0], [0.2, 1.0, 0.5]]))
    assert torch.allclose(relation.negative, torch.tensor([[1.0, 0.2, 0.0], [0.8, 0.0, 0.5]]))
    assert relation.as_grades()[0, 2].isnan()


def test_infonce_with_soft_weights_against_its_definition():
    s = torch.rand(3, 4, dtype=torch.float64)
    positive, negative = torch.rand(3, 4).double().round(decimals=1), torch.rand(3, 4).double()
    terms, weights = 0.0, 0.0
    for i in range(3):
        below = sum(float(negative[i, j]) * math.exp(float(s[i, j]) / 0.2) for j in range(4))
        for j in range(4):
            own = math.exp(float(s[i, j]) / 0.2)
            p = own / (own + below)
            terms += float(positive[i, j]) * -math.log(p) * (1 - p) ** 0.5
            weights += float(positive[i, j])
    ours = o.InfoNCE(temperature=0.2, gamma=0.5)(s, Relation(positive, negative))
    assert math.isclose(float(ours), terms / weights, rel_tol=1e-9)


def test_masks_of_likely_false_negatives():
    s = torch.tensor([[0.7, 0.75, 0.9, 0.2], [0.1, 0.8, 0.3, 0.95]])
    relation = Relation.diagonal(2, 4)
    assert o.FalseNegativeMask(margin=0.1)(s, relation).negative.int().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert o.FalseNegativeMask(above=0.25)(s, relation).negative.int().tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert o.HardestNegatives(1)(s, relation).negative.int().tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    with pytest.raises(InputError, match="Nothing to mask by"):
        o.FalseNegativeMask()


def test_triplets_are_kept_by_what_comes_after_as_far_as_their_pairs_are():
    similarity = o.CosineSimilarity()(vectors()).detach()
    mined = o.TripletMiner("violating", one=False)(similarity, Relation.from_labels(LABELS))
    masked = o.FalseNegativeMask(above=0.2)(similarity, mined)
    a, _, n = mined.triplets.T
    assert torch.equal(masked.triplets, mined.triplets[similarity[a, n] <= 0.2])
    drop = torch.zeros(10, 10, dtype=torch.bool)
    drop[0] = True
    assert torch.equal(mined.ignore(drop).triplets, mined.triplets[a != 0])
    assert 0 < len(masked.triplets) < len(mined.triplets)


def test_relations_from_pairs_and_symmetry():
    listed = Relation.from_pairs((2, 3), torch.tensor([[0, 1]]), torch.tensor([[1, 2]]))
    assert listed.positive.int().tolist() == [[0, 1, 0], [0, 0, 0]]
    assert listed.negative.int().tolist() == [[0, 0, 0], [0, 0, 1]]
    rest = Relation.from_pairs((3, 3), torch.tensor([[0, 1]]), itself=True)
    assert rest.negative.int().tolist() == [[0, 0, 1], [1, 0, 1], [1, 1, 0]]
    assert rest.transposed.positive.int().tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    with pytest.raises(InputError, match="one shape"):
        Relation(torch.ones(2, 2), torch.ones(2, 3))


def test_snr_is_a_variance_ratio_blind_to_scale_and_squared_distance_at_zero_mean():
    x, y = vectors(4), vectors(5, seed=1)
    ratio = torch.stack([torch.stack([(b - a).var() / a.var() for b in y]) for a in x])
    assert torch.allclose(o.SNRSimilarity()(x, y), -ratio)
    assert torch.allclose(o.SNRSimilarity()(3 * x, 3 * y), -ratio)
    x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    plain = torch.cdist(x, y).square() / x.square().sum(1, keepdim=True)
    assert torch.allclose(o.SNRSimilarity()(x, y), -plain)
    assert o.ZeroMeanRegularizer(0.5)(x) < 1e-12
    assert torch.allclose(o.ZeroMeanRegularizer(0.5)(x + 2), torch.tensor(6.0, dtype=torch.float64))


def test_pair_weights_have_the_closed_forms_of_the_paper():
    s = o.CosineSimilarity()(vectors()).detach()
    relation = Relation.from_labels(LABELS)
    p, n = relation.is_positive, relation.is_negative
    found = o.pair_weights(o.ContrastiveLoss(pos_margin=1.0, neg_margin=-2.0), s, relation)
    assert torch.allclose(found[p], torch.full_like(found[p], -1 / int(p.sum())))
    assert torch.allclose(found[n], torch.full_like(found[n], 1 / int(n.sum())))
    found = o.pair_weights(o.MultiSimilarityLoss(alpha=2, beta=50, base=0.5), s, relation) * len(s)
    for i in range(len(s)):
        for j in p[i].nonzero()[:, 0]:
            below = torch.exp(2 * (s[i, j] - 0.5)) + torch.exp(-2 * (s[i, p[i]] - s[i, j])).sum()
            assert torch.allclose(found[i, j], -1 / below)
        for j in n[i].nonzero()[:, 0]:
            below = torch.exp(50 * (0.5 - s[i, j])) + torch.exp(50 * (s[i, n[i]] - s[i, j])).sum()
            assert torch.allclose(found[i, j], 1 / below)
    found = o.pair_weights(o.TripletLoss(margin=9.0), s, relation)
    triplets = int((p.sum(1) * n.sum(1)).sum())
    assert torch.allclose(found, (n * p.sum(1, True) - p * n.sum(1, True)).double() / triplets)


def test_alignment_and_uniformity_against_their_definitions():
    x, y = vectors(), vectors(seed=1)
    unit, other = nn.functional.normalize(x), nn.functional.normalize(y)
    assert torch.allclose(o.alignment(x, y), (unit - other).norm(dim=1).square().mean())
    expected = torch.pdist(unit).square().mul(-2).exp().mean().log()
    assert torch.allclose(o.uniformity(x), expected)
    assert torch.allclose(o.uniformity(x, chunk=3), expected)
    assert torch.allclose(o.uniformity(torch.ones(5, 3)), torch.tensor(0.0))
    labels = torch.arange(10).repeat(2)
    both = torch.cat((x, y))
    loss = Objective(o.AlignUniformLoss(align=0.7, uniform=0.4))(both, labels)
    distance = torch.cdist(nn.functional.normalize(both), nn.functional.normalize(both)).square()
    apart = labels[:, None] != labels
    expected = 0.7 * o.alignment(x, y) + 0.4 * distance[apart].mul(-2).exp().mean().log()
    assert torch.allclose(loss, expected)
    with pytest.raises(InputError, match="at least 2 vectors"):
        o.uniformity(x[:1])


def test_points_spread_over_the_sphere_have_the_closed_form_uniformity():
    """For uniform points on S^2, E exp(-2 d^2) = (1 - e^-8) / 8, since d^2 is uniform on [0, 4]."""
    x = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0))
    assert abs(float(o.uniformity(x)) - math.log((1 - math.exp(-8)) / 8)) < 0.02


def test_alignment_and_uniformity_of_every_head():
    x, y = torch.randn(7, 2, 3, 4), torch.randn(7, 2, 3, 4)
    close, spread = o.head_alignment_uniformity(x, y)
    assert close.values.shape == (2, 3)
    assert math.isclose(float(close.values[1, 2]), float(o.alignment(x[:, 1, 2], y[:, 1, 2])), rel_tol=1e-6)
    assert math.isclose(float(spread.values[0, 1]), float(o.uniformity(x[:, 0, 1])), rel_tol=1e-6)
    with pytest.raises(InputError, match="layers, heads"):
        o.head_alignment_uniformity(x, y[:3])
