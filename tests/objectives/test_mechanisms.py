"""Contextual, block, mean-field, hyperbolic, Gaussian, multi-head and coupled objectives against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from polyhead import objectives as o
from polyhead.errors import InputError
from polyhead.objectives import Objective, Relation

LABELS = torch.tensor([0, 0, 1, 1, 2, 0])


def vectors(n: int = 6, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


# --- contextual ---


def overlap_by_sets(cosine, k, epsilon=0.05):
    n = len(cosine)
    distance = 2 - 2 * cosine

    def neighbours(count):
        return [
            {j for j in range(n) if distance[i, j] <= distance[i].sort().values[count - 1] + epsilon} for i in range(n)
        ]

    near, half = neighbours(k), neighbours(k // 2)
    every = set(range(n))
    first = torch.zeros(n, n, dtype=cosine.dtype)
    for i in range(n):
        for j in near[i]:
            first[i, j] = 0.5 * len(near[i] & near[j]) / len(near[i])
            rest = every - near[i]
            first[i, j] += 0.5 * len(rest - near[j]) / len(rest) if rest else 0
    second = torch.zeros_like(first)
    for i in range(n):
        mutual = [j for j in half[i] if i in half[j]]
        if mutual:
            second[i] = first[mutual].mean(0)
    return (second + second.T) / 2


@pytest.mark.parametrize("k", [2, 3, 5, 9])
def test_contextual_similarity_equals_sets_of_neighbours(k):
    cosine = o.CosineSimilarity()(vectors(9)).detach()
    assert torch.allclose(o.contextual_similarity(cosine, k), overlap_by_sets(cosine, k))
    with pytest.raises(InputError, match="k of 2 to n"):
        o.contextual_similarity(cosine, 10)
    with pytest.raises(InputError, match="expected"):
        o.contextual_similarity(cosine[:, :4], 3)


def test_contextual_loss_against_its_definition_and_zero_for_perfect_clusters():
    x = vectors(9)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
    s = o.CosineSimilarity()(x)
    same = labels[:, None] == labels[None]
    off = ~torch.eye(9, dtype=torch.bool)
    w = overlap_by_sets(s.detach(), 3)
    context = (((1 - w) ** 2)[same & off].sum() + (w**2)[~same].sum()) / 81
    near, far = (0.75 - s[same & off]).relu(), (s[~same] - 0.6).relu()
    contrast = near.sum() / (near > 0).sum() + far.sum() / (far > 0).sum().clamp(min=1)
    expected = 0.6 * context + 0.4 * contrast + 0.5 * (s.mean() - 0.3) ** 2
    found = Objective(o.ContextualLoss(k=3, regularize=0.5))(x, labels)
    assert torch.allclose(found, expected)
    found.backward()
    assert x.grad.isfinite().all()
    clusters = torch.eye(3).repeat_interleave(3, 0).requires_grad_()
    assert Objective(o.ContextualLoss(k=3))(clusters, labels) == 0


def test_steps_pass_gradients_as_if_sloped():
    s = o.CosineSimilarity()(vectors(6)).detach().requires_grad_()
    o.contextual_similarity(s, 3).sum().backward()
    assert s.grad.abs().sum() > 0
    assert s.grad.isfinite().all()


# --- nbc-softmax ---


def test_block_contrast_by_hand_and_its_mix_with_softmax():
    x = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 5.0], [-1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([4, 4, 7, 9])  # means (1, 1), (0, 5), (-1, 0)
    c = math.sqrt(0.5)
    rows = [1 + math.exp(0.2 * c) + math.exp(-0.2 * c), math.exp(0.2 * c) + 1 + 1, math.exp(-0.2 * c) + 1 + 1]
    assert math.isclose(float(o.block_contrast(x, labels, tau=0.2)), sum(map(math.log, rows)) / 3)
    objective = o.NBCSoftmax(3, 6, ratio=0.3).double()
    x = vectors()
    softmax = nn.functional.cross_entropy(x @ objective.classification.proxies.T, LABELS)
    assert torch.allclose(objective(x, LABELS), 0.7 * softmax + 0.3 * o.block_contrast(x, LABELS))
    projected = o.NBCSoftmax(3, 6, ratio=1.0, projection=2).double()
    assert torch.allclose(projected(x, LABELS), o.block_contrast(projected.projection(x), LABELS))
    torch.autograd.gradcheck(lambda x: objective(x, LABELS), (x,))
    with pytest.raises(InputError, match="need 6 labels"):
        o.block_contrast(x, LABELS[:2])


# --- mean field ---


def test_mean_field_losses_against_their_definitions():
    x = vectors()
    for name in ("contrastive", "multi"):
        if name == "contrastive":
            objective = o.MeanFieldContrastive(4, 6, pos_margin=0.1, neg_margin=1.1, weight=0.7).double()
        else:
            objective = o.MeanFieldMultiSimilarity(4, 6, alpha=2, beta=8, base=0.4, weight=0.7).double()
        d = 1 - nn.functional.normalize(x) @ nn.functional.normalize(objective.proxies).T
        fields = 1 - nn.functional.normalize(objective.proxies) @ nn.functional.normalize(objective.proxies).T
        total = 0.0
        if name == "contrastive":
            for i, label in enumerate(LABELS):
                for c in range(4):
                    total = total + ((d[i, c] - 0.1).relu() if c == label else (1.1 - d[i, c]).relu()) / 6
        else:
            for c in range(3):
                total = total + torch.exp(2 * (d[c == LABELS, c] + 0.4 - 1)).mean().log1p() / (2 * 3)
            for c in range(4):
                for other in range(4):
                    if c != other:
                        parts = [
                            torch.exp(-8 * (d[a == LABELS, b] + 0.4 - 1)).mean()
                            for a, b in ((c, other), (other, c))
                            if (a == LABELS).any()
                        ]
                        total = total + sum(parts).log1p() / (2 * 8 * 3)
        for c in range(4):
            for other in range(4):
                if c != other:
                    near = (1.1 - fields[c, other]).relu() if name == "contrastive" else None
                    near = nn.functional.softplus(8 * (0.6 - fields[c, other])) / 8 if near is None else near
                    total = total + 0.7 * near**2 / 4
        assert torch.allclose(objective(x, LABELS), total)
        torch.autograd.gradcheck(lambda x, objective=objective: objective(x, LABELS), (x,))


# --- hyperbolic ---


def mobius(x, y, c):
    xy, xx, yy = (x * y).sum(), (x * x).sum(), (y * y).sum()
    return ((1 + 2 * c * xy + c * yy) * x + (1 - c * xx) * y) / (1 + 2 * c * xy + c**2 * xx * yy)


def test_hyperbolic_distance_is_that_of_the_mobius_sum_and_twice_euclid_without_curvature():
    c = 0.4
    head = o.PoincareHead(6, 3, c=c).double()
    x, y = head(vectors(4)).detach(), head(vectors(5, seed=1)).detach()
    expected = torch.stack(
        [torch.stack([2 / c**0.5 * torch.atanh(c**0.5 * mobius(-a, b, c).norm()) for b in y]) for a in x]
    )
    assert torch.allclose(o.HyperbolicSimilarity(c)(x, y), -expected)
    flat = o.HyperbolicSimilarity(1e-9)(x, y)
    assert torch.allclose(flat, -2 * torch.cdist(x, y), atol=1e-6)
    outside = o.HyperbolicSimilarity(c)(100 * x, -100 * y)
    assert outside.isfinite().all()
    with pytest.raises(InputError, match="expected above 0"):
        o.HyperbolicSimilarity(0.0)


def test_the_head_clips_and_maps_into_the_ball():
    head = o.PoincareHead(6, 3, c=0.1, clip=2.3).double()
    x = torch.cat((vectors(4) * 100, vectors(4, seed=1) * 0.01)).detach()
    v = head.linear(x)
    v = v * (2.3 / v.norm(dim=1, keepdim=True)).clamp(max=1)
    size = 0.1**0.5 * v.norm(dim=1, keepdim=True)
    assert torch.allclose(head(x), torch.tanh(size) * v / size)
    assert (head(x).norm(dim=1) < 1 / 0.1**0.5).all()
    assert head(torch.zeros(1, 6, dtype=torch.float64)).abs().sum() == 0


def test_pairwise_cross_entropy_of_the_paper_is_infonce_on_hyperbolic_similarity():
    """Batches of two a class: -log e^{-D(i,j)/t} / sum over all k but i."""
    x = o.PoincareHead(6, 3).double()(vectors()).detach()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    compare = o.HyperbolicSimilarity(0.1)
    logits = compare(x) / 0.2
    logits.fill_diagonal_(-torch.inf)
    expected = nn.functional.cross_entropy(logits, torch.tensor([3, 4, 5, 0, 1, 2]))
    assert torch.allclose(Objective(o.InfoNCE(temperature=0.2), compare)(x, labels), expected)


def test_gromov_delta_is_zero_for_trees_and_not_for_circles():
    tree = torch.tensor([[0, 2, 2, 4], [2, 0, 2, 4], [2, 2, 0, 4], [4, 4, 4, 0]], dtype=torch.float64)
    assert o.gromov_delta(tree) == 0
    steps = torch.arange(8)
    circle = torch.minimum((steps[:, None] - steps[None]) % 8, (steps[None] - steps[:, None]) % 8).double()
    d = circle
    best = 0.0
    for i in range(8):  # four-point condition from the first point
        for j in range(8):
            for k in range(8):
                products = [(d[0, a] + d[0, b] - d[a, b]) / 2 for a, b in ((i, k), (k, j), (i, j))]
                best = max(best, float(min(products[:2]) - products[2]))
    assert o.gromov_delta(circle) == 2 * best / 4
    assert best > 0
    with pytest.raises(InputError, match="square"):
        o.gromov_delta(circle[:2])


# --- Gaussians ---


def test_match_of_near_points_is_the_sigmoid_of_their_distance():
    means = vectors(4, 3)
    sure = torch.cat((means, torch.full_like(means, -40.0)), 1)
    compare = o.MatchSimilarity(samples=3).double()
    expected = 1.0 - torch.cdist(means, means)
    assert torch.allclose(compare(sure), expected, atol=1e-6)
    assert torch.allclose(compare.paired(sure, sure.flip(0)), expected.flip(1).diagonal(), atol=1e-6)


def test_match_probability_against_a_large_sample_and_its_gradient():
    pair = torch.tensor([[0.0, 0.5, -0.3, 0.4], [1.0, 0.0, 0.2, -0.6]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    draws = [
        row[:2] + (row[2:] / 2).exp() * torch.randn(50_000, 2, dtype=torch.float64, generator=generator) for row in pair
    ]
    p = torch.sigmoid(1.0 - (draws[0] - draws[1]).norm(dim=1)).mean()
    found = torch.sigmoid(o.MatchSimilarity(samples=400, seed=0).double().paired(pair[:1], pair[1:]))[0]
    assert abs(float((found - p).detach())) < 0.02
    compare = o.MatchSimilarity(samples=3, seed=0).double()
    x = vectors(3, 4)
    torch.autograd.gradcheck(lambda x: compare(x), (x,))
    objective = Objective(o.SoftContrastiveLoss(), compare, regularizers=[o.GaussianKL(0.1)])
    objective(x, torch.tensor([0, 0, 1])).backward()
    assert compare.log_scale.grad != 0
    assert compare.shift.grad != 0
    wide = torch.tensor([[0.0, 0.0, -6.0, -6.0], [0.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    low, high = o.self_mismatch(compare, wide).tolist()
    assert low < high


def test_soft_contrastive_and_kl_against_torch():
    x = vectors()
    s = o.CosineSimilarity()(x)
    relation = Relation.from_labels(LABELS)
    known = ~torch.eye(6, dtype=torch.bool)
    expected = nn.functional.binary_cross_entropy_with_logits(s[known], relation.positive[known].double())
    assert torch.allclose(o.SoftContrastiveLoss()(s, relation), expected)
    mean, spread = x.chunk(2, 1)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (spread / 2).exp()), normal(0.0, 1.0)).sum(1).mean()
    assert torch.allclose(o.GaussianKL(0.3)(x), 0.3 * kl)
    with pytest.raises(InputError, match="even number"):
        o.GaussianKL()(x[:, :5])


def test_negative_kl_equals_torch_and_its_inner_product_ranks_alike():
    q, d = vectors(3), vectors(7, seed=1)
    parts = [(x[:, :3], (x[:, 3:] / 2).exp()) for x in (q, d)]
    normal = torch.distributions.Normal
    first = normal(parts[0][0][:, None], parts[0][1][:, None])
    kl = torch.distributions.kl_divergence(first, normal(*(p[None] for p in parts[1]))).sum(-1)
    found = o.NegativeKLSimilarity()(q, d)
    assert torch.allclose(found, -kl)
    dot = o.to_inner_product(q, "query") @ o.to_inner_product(d, "document").T
    offset = dot - 2 * found
    assert torch.allclose(offset, offset[:, :1].expand_as(offset)), "the rest depends on the query alone"
    same = torch.cat((d[:, :3], torch.zeros(7, 3)), 1)
    points = torch.cat((q[:, :3], torch.zeros(3, 3)), 1)
    assert torch.allclose(o.NegativeKLSimilarity()(points, same), -0.5 * torch.cdist(q[:, :3], d[:, :3]) ** 2)
    with pytest.raises(InputError, match="'query' or 'document'"):
        o.to_inner_product(q, "both")


def test_gaussian_heads_give_means_and_variances():
    x = vectors(4)
    for kind in ("exp", "softplus"):
        head = o.GaussianHead(6, 2, variance=kind).double()
        mean, spread = head(x).chunk(2, 1)
        assert torch.allclose(mean, head.mean(x))
        expected = head.spread(x).exp() if kind == "exp" else nn.functional.softplus(head.spread(x))
        assert torch.allclose(spread.exp(), expected)
    assert not torch.allclose(head(x, x.flip(0)), head(x))


# --- multi-head ---


def test_multi_head_objective_is_the_sum_over_heads_with_its_regulariser():
    x, y = vectors(4, 6).unflatten(1, (2, 3)), vectors(4, 6, seed=1).unflatten(1, (2, 3))
    temperature = o.AdaptiveTemperature(2, low=0.1, high=1.0, start=0.3).double()
    assert torch.allclose(temperature(torch.rand(2, 4, 4).double()), torch.tensor(0.3).double())
    nn.init.normal_(temperature.second)
    objective = o.MultiHeadObjective(2, temperature, beta=0.1)
    expected = 0.0
    for h in range(2):
        s = nn.functional.normalize(x[:, h]) @ nn.functional.normalize(y[:, h]).T
        inner = torch.tanh(s[..., None] * temperature.first[h] + temperature.bias[h])
        tau = 0.1 + 0.9 * torch.sigmoid((inner * temperature.second[h]).sum(-1) + temperature.shift[h])
        assert (tau.max() - tau.min()) > 0.01
        expected = expected + nn.functional.cross_entropy(s / tau, torch.arange(4))
        expected = expected + 0.1 * (1.5 * tau.log() + 1 / tau).mean()
    assert torch.allclose(objective(x, other=y), expected)
    fixed = o.MultiHeadObjective(2, fixed=0.3)
    one = Objective(o.InfoNCE(temperature=0.3))
    assert torch.allclose(fixed(x, LABELS[:4]), one(x[:, 0], LABELS[:4]) + one(x[:, 1], LABELS[:4]))
    with pytest.raises(InputError, match=r"\[n, 2, d\]"):
        objective(x[:, :1], other=y)


def test_heads_of_the_projector_are_networks_of_their_own():
    projector = o.MultiHeadProjector(6, 3, heads=2, hidden=5).double()
    x = vectors(4)
    for h in range(2):
        expected = (x @ projector.first[h] + projector.bias[h]).relu() @ projector.second[h]
        assert torch.allclose(projector(x)[:, h], expected)


# --- coupled estimation ---


def test_ratio_weights_against_their_definition():
    scores = torch.tensor([[1.0, 0.0, 3.0], [0.5, -9.0, 2.0]])
    relation = Relation(torch.tensor([[1, 0, 0], [0, 0, 1]]).bool(), torch.tensor([[0, 1, 1], [1, 1, 0]]).bool())
    weights = o.RatioWeights((0.05, 1.0))(scores, relation).negative
    assert torch.allclose(weights, torch.tensor([[0, math.exp(-1), 1.0], [math.exp(-1.5), 0.05, 0]]))
    loss = o.InfoNCE(temperature=1.0)(torch.zeros(2, 3), o.RatioWeights()(scores, relation))
    expected = [math.log(1 + math.exp(-1) + 1), math.log(1 + math.exp(-1.5) + 0.05)]
    assert math.isclose(float(loss), sum(expected) / 2, rel_tol=1e-6)
    with pytest.raises(InputError, match="the lower first"):
        o.RatioWeights((1.0, 0.5))


def test_coupled_estimation_forgives_unjudged_positives():
    """Relevant candidates that were judged are labelled (the first) or left out; those not judged look negative."""
    generator = torch.Generator().manual_seed(0)
    judged = torch.rand(60, 6, generator=generator) < 0.5
    relevant = (torch.rand(60, 6, generator=generator) < 0.5) & ~judged
    relevant[:, 0] = judged[:, 0] = True
    features = relevant[..., None] + 0.5 * torch.randn(60, 6, 1, generator=generator)
    marks = judged[..., None].float()
    first = torch.zeros(60, dtype=torch.long)
    found = []
    for selection in (None, nn.Linear(1, 1)):
        torch.manual_seed(0)
        network = nn.Linear(1, 1)
        model = o.CoupledEstimator(network, selection, epochs=40, lr=0.2).fit(features, first, marks)
        assert model.losses_[-1] < model.losses_[0]
        found.append(float(network.weight.detach()))
    assert found[1] > 1.2 * found[0] > 0, "silent witnesses against relevance are weighed down"
    with pytest.raises(InputError, match="one positive a list"):
        model.fit(features, first[:5])


def test_pools_and_false_negatives():
    qrels = {"1": {"a": 1, "b": 2, "c": 0}, "2": {"d": 1}}
    assert o.judged_within(qrels, {"1": ["b", "c", "a"]}, 2) == {"1": {"b": 2, "c": 0}, "2": {}}
    assert o.false_negative_rate(qrels, {"1": ["a", "c"], "2": ["e", "d"]}) == 0.5
    with pytest.raises(InputError, match="No negatives"):
        o.false_negative_rate(qrels, {})
