"""What every objective keeps: shapes, order, weights as counts, nothing to learn from, gradients, half precision."""

from __future__ import annotations

import pytest
import torch
from objective_parts import CLASSWISE, LOSSES, MINERS, SIMILARITIES

from polyhead import objectives as o
from polyhead.errors import InputError
from polyhead.objectives import InfoNCE, Objective, Relation

LABELS = torch.tensor([0, 0, 1, 1, 2, 0, 3, 2])


def vectors(n: int = 8, dim: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrix(n: int, m: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def close(a, b, tolerance=1e-9):
    return torch.allclose(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), atol=tolerance
    )


losses = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


@losses
def test_gives_one_number_for_any_shape_and_refuses_two(loss):
    for labels in (torch.tensor([0, 1, 1]), torch.tensor([5, 1, 0, 0, 1, 2, 2])):
        value = loss()(matrix(8, len(labels)), Relation.from_labels(LABELS, labels))
        assert value.shape == ()
        assert value.isfinite()
    with pytest.raises(InputError, match="differ in shape"):
        loss()(matrix(8, 7), Relation.from_labels(LABELS))


@losses
def test_the_order_of_rows_and_columns_does_not_matter(loss):
    similarity = matrix(8, 8)
    relation = Relation.from_labels(LABELS)
    rows, columns = torch.randperm(8), torch.randperm(8)
    moved = Relation(relation.positive[rows][:, columns], relation.negative[rows][:, columns])
    assert close(loss()(similarity[rows][:, columns], moved), loss()(similarity, relation))


@losses
def test_a_weight_counts_a_pair_so_many_times(loss):
    """Weight 3 for what stands in a column (a row where columns are the anchors) is that column three times."""
    similarity, relation = matrix(8, 5), Relation.from_labels(LABELS, torch.tensor([0, 1, 2, 3, 3]))
    dim = 0 if loss in CLASSWISE else 1
    counts = torch.tensor([1, 3, 1, 2, 1, 1, 2, 1][: similarity.shape[dim]])
    shape = (1, -1) if dim == 1 else (-1, 1)
    # A row that counts thrice is a thrice as likely member of its class; its negatives follow from that.
    twice = 1 if loss is LOSSES["mean-field-ms"] else counts.view(shape)
    weighted = relation.weigh(counts.view(shape), twice)
    many = Relation(*(part.repeat_interleave(counts, dim) for part in (relation.positive, relation.negative)))
    assert close(loss()(similarity, weighted), loss()(similarity.repeat_interleave(counts, dim), many))


@losses
def test_nothing_to_learn_from_is_zero_with_a_zero_gradient(loss):
    similarity = matrix(4, 4).requires_grad_()
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    value = loss()(similarity, Relation(nothing, nothing))
    value.backward()
    assert value == 0
    assert (similarity.grad == 0).all()


@losses
def test_rows_without_positives_or_negatives_leave_gradients_finite(loss):
    x = vectors(4).requires_grad_()
    objective = Objective(loss())
    for labels in (torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 1, 2])):
        x.grad = None
        objective(x, labels).backward()
        assert x.grad.isfinite().all()


@losses
def test_ignored_pairs_do_not_reach_the_loss(loss):
    similarity = matrix(8, 8)
    relation = Relation.from_labels(LABELS)
    drop = torch.rand(8, 8, generator=torch.Generator().manual_seed(3)) < 0.3
    left = relation.ignore(drop)
    changed = similarity.masked_fill(drop | torch.eye(8, dtype=torch.bool), 0.77)
    assert close(loss()(changed, left), loss()(similarity, left))


@losses
def test_gradient_check(loss):
    x = vectors(6, 4).requires_grad_()
    torch.autograd.gradcheck(lambda x: Objective(loss())(x, LABELS[:6]), (x,), atol=1e-5)


@pytest.mark.parametrize("similarity", SIMILARITIES.values(), ids=SIMILARITIES)
def test_gradient_check_of_similarities(similarity):
    x, y = vectors(3, 4).requires_grad_(), vectors(5, 4, seed=1).requires_grad_()
    torch.autograd.gradcheck(lambda x, y: similarity()(x, y), (x, y))


@pytest.mark.parametrize("similarity", SIMILARITIES.values(), ids=SIMILARITIES)
def test_similarities_compare_itself_in_pairs_and_over_leading_dimensions(similarity):
    compare, x, y = similarity(), vectors(5, 4), vectors(5, 4, seed=1)
    whole = compare(x, y)
    assert whole.shape == (5, 5)
    assert close(compare.paired(x, y), whole.diagonal())
    assert close(compare(x[:, None], y.expand(5, 5, 4))[:, 0], whole)
    assert close(compare(x), compare(x, x))
    with pytest.raises(InputError, match="cannot be compared"):
        compare(x, vectors(5, 6))


@losses
def test_bfloat16_is_finite_and_near(loss):
    x = vectors().float()
    objective = Objective(loss())
    half = x.bfloat16().requires_grad_()
    value = objective(half, LABELS)
    value.backward()
    assert value.dtype == torch.float32
    assert half.grad.isfinite().all()
    assert close(value.detach(), objective(x.bfloat16().float(), LABELS), 1e-4)


@losses
def test_any_goes_with_any(loss):
    """Every similarity and every miner, with labels, rows that belong together, and grades."""
    kinds = ((LABELS, None), (None, vectors(9, seed=2)), (torch.linspace(0, 5, 8), vectors(seed=3)))
    pairs = [(similarity, o.HardestNegatives) for similarity in SIMILARITIES.values()]
    pairs += [(o.CosineSimilarity, miner) for miner in MINERS.values()]
    for number, (similarity, miner) in enumerate(pairs):
        relation, other = kinds[number % 3]
        x = vectors().requires_grad_()
        value = Objective(loss(), similarity(), [miner() if miner in MINERS.values() else miner(3)])(x, relation, other)
        value.backward()
        assert value.isfinite()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("miner", MINERS.values(), ids=MINERS)
def test_miners_choose_among_what_is_there(miner):
    similarity, relation = matrix(8, 8), Relation.from_labels(LABELS)
    mined = miner()(similarity, relation)
    assert (mined.is_positive <= relation.is_positive).all()
    assert (mined.is_negative <= relation.is_negative).all()
    assert mined.negative.sum() < relation.is_negative.sum(), "something was left out or counts less"


def test_arguments_that_do_not_go_together_are_refused():
    objective, x = Objective(InfoNCE()), vectors()
    with pytest.raises(InputError, match="Give labels"):
        objective(x)
    with pytest.raises(InputError, match="8 embeddings need 8 labels"):
        objective(x, LABELS[:3])
    with pytest.raises(InputError, match="Graded pairs need"):
        objective(x, torch.rand(8))
    with pytest.raises(InputError, match="8 labels, 9 others"):
        objective(x, LABELS, vectors(9))
    with pytest.raises(InputError, match="at least 8 others"):
        objective(x, other=vectors(5))
    with pytest.raises(InputError, match="reduction is"):
        LOSSES["contrastive"]().__class__(reduction="max")
