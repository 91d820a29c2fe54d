"""The laboratory against what is known in closed form."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from polyhead.claims.base import Evidence, claim_ids
from polyhead.errors import InputError
from polyhead.lab import base, experiments, find
from polyhead.lab.clustering_heads import SparseModularAddition, TinyVisualTransformer, cluster_count, train
from polyhead.lab.icl_linreg import LinearICLAttention, debiased_step, regression_prompts, ridge_predictions
from polyhead.lab.low_rank_bottleneck import exact_head, fit_heads
from polyhead.lab.memorization import AttentionMemorizer, capacity_bound, feature_rank, memorised
from polyhead.lab.rank_in_attention import RankLimitedAttention, neighbour_error, neighbours
from polyhead.lab.task_diversity import ICLRegression, dmmse, ridge_icl

generator = torch.Generator().manual_seed(3)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# Low-rank bottleneck ------------------------------------------------------------------------------------------------


def test_a_head_of_tokens_less_one_makes_any_pattern_exactly() -> None:
    inputs, target = rand(6, 10), (2 * rand(6, 6)).softmax(-1)
    query, key = exact_head(inputs, target)
    assert query.shape == key.shape == (10, 5)
    torch.testing.assert_close((inputs @ query @ key.T @ inputs.T).softmax(-1), target, rtol=1e-9, atol=1e-12)
    with pytest.raises(InputError, match="must have rank 6"):
        exact_head(rand(6, 4), target)


def test_a_narrower_head_cannot_and_the_best_of_one_is_bounded_by_rank() -> None:
    inputs = torch.randn(8, 16, generator=generator)
    # Everyone attends sharply to itself: logits of full rank are needed, up to a constant a row.
    targets = (6 * torch.eye(8)).softmax(-1)[None]
    divergence = {size: float(fit_heads(inputs, targets, size, steps=250)[0]) for size in (1, 2, 7)}
    assert divergence[1] > divergence[2] > 10 * divergence[7]
    # A head of one number orders all keys by one number (or its reverse): half the queries cannot see themselves first.
    assert divergence[1] > 0.5
    assert divergence[7] < 0.02


# Rank in attention --------------------------------------------------------------------------------------------------


def test_one_full_rank_head_is_the_nearest_neighbour_as_it_sharpens() -> None:
    around, query, nearest = neighbours(400, 8, 16, generator)
    expected = np.array(
        [max(points, key=lambda x: float(x @ y)) for points, y in zip(around.numpy(), query.numpy(), strict=True)]
    )
    np.testing.assert_array_equal(nearest.numpy(), expected)
    layer = RankLimitedAttention(16, 16, 1)
    errors = []
    for sharpness in (1.0, 10.0, 1_000.0):
        with torch.no_grad():
            for weight, value in ((layer.query, sharpness), (layer.key, 1.0), (layer.value, 1.0), (layer.output, 1.0)):
                weight.copy_(value * torch.eye(16)[None, None])
        errors.append(float((layer(around, query) - nearest).square().sum(1).mean().detach()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.02


def test_a_layer_is_its_formula_and_its_forms_have_its_rank() -> None:
    layer = RankLimitedAttention(6, 2, 3).double()
    points, query = rand(4, 5, 6), rand(4, 6)
    expected = []
    for x, y in zip(points, query, strict=True):
        answer = torch.zeros(6, dtype=torch.float64)
        for head in range(3):
            form = layer.key[0, head] @ layer.query[0, head].T
            assert torch.linalg.matrix_rank(form) == 2
            weights = (x @ form @ y).softmax(0)
            answer = answer + layer.output[0, head] @ layer.value[0, head].T @ (weights @ x)
        expected.append(answer)
    torch.testing.assert_close(layer(points, query), torch.stack(expected))
    assert torch.autograd.gradcheck(layer, (points, query.requires_grad_()))
    with pytest.raises(InputError, match="rank <= 6"):
        RankLimitedAttention(6, 7, 1)


def test_training_lowers_the_error_below_answering_nothing() -> None:
    assert neighbour_error(4, 1, 2, steps=150, dim=4) < 0.6


# In-context regression ----------------------------------------------------------------------------------------------


def two_heads(rate: float) -> LinearICLAttention:
    """Opposite heads ``KQ = +-w I``, ``mu = +-rate / 2 w``: to first order in w the debiased gradient step."""
    layer = LinearICLAttention(3, heads=2).double()
    with torch.no_grad():
        layer.key_query.zero_()
        layer.output_value.zero_()
        for head, sign in enumerate((1.0, -1.0)):
            layer.key_query[head, :3] = sign * rate * torch.eye(3)
            layer.output_value[head, 3] = sign / (2 * rate)
    return layer


def test_two_opposite_heads_are_one_debiased_gradient_step_to_second_order() -> None:
    x, y, question = rand(20, 12, 3) + 0.7, rand(20, 12) + 2.0, rand(20, 3)
    mean_x, mean_y = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    expected = ((y - mean_y)[..., None] * (x - mean_x)).mean(1)
    expected = (expected * question).sum(1)
    torch.testing.assert_close(debiased_step(x, y, question), expected)
    errors = [float((two_heads(w)(x, y, question) - expected).abs().max().detach()) for w in (1e-2, 1e-3)]
    assert errors[1] < errors[0] / 50  # second order in w: a hundredth
    assert errors[1] < 1e-4
    # One head alone keeps the bias mu mean(y).
    one = LinearICLAttention(3, heads=1).double()
    with torch.no_grad():
        one.key_query.zero_()
        one.output_value.copy_(torch.tensor([[0.0, 0.0, 0.0, 2.0]]))
    torch.testing.assert_close(one(x, y, question), 2 * y.mean(1))


def test_ridge_is_the_normal_equations_and_the_form_is_told() -> None:
    x, y, question, answer = regression_prompts(5, 30, 3, 0.0, generator)
    given = ridge_predictions(x.double(), y.double(), question.double(), 1e-9)
    torch.testing.assert_close(given, answer.double(), rtol=1e-4, atol=1e-5)
    form = two_heads(0.1).form()
    assert form == {"off-diagonal": 0.0, "sum of mu": 0.0}


def test_linear_attention_divides_by_the_length() -> None:
    layer = LinearICLAttention(2, heads=1, softmax=False).double()
    x, y, question = rand(4, 6, 2), rand(4, 6), rand(4, 2)
    pairs = torch.cat([x, y[..., None]], -1)
    scores = pairs @ layer.key_query[0] @ question[..., None]
    torch.testing.assert_close(layer(x, y, question), (scores * pairs).mean(1) @ layer.output_value[0])


# Task diversity -----------------------------------------------------------------------------------------------------


def test_dmmse_is_the_posterior_mean_over_the_pool() -> None:
    data = ICLRegression(3, 5, 4, 0.5)
    x, y, _ = (each.double() for each in data.sample(6, generator))
    pool = data.pool.double()
    found = dmmse(x, y, pool, 0.5)
    for b, k in itertools.product(range(6), range(5)):
        weights = torch.stack([torch.exp(-((y[b, :k] - x[b, :k] @ w) ** 2).sum() / (2 * 0.25)) for w in pool])
        expected = (weights / weights.sum()) @ (pool @ x[b, k])
        assert float(found[b, k]) == pytest.approx(float(expected), abs=1e-9)
    # With one task it knows everything: what is left is the noise.
    alone = ICLRegression(3, 5, 1, 0.5)
    x, y, _ = alone.sample(4_000, generator)
    assert float((dmmse(x, y, alone.pool, 0.5) - y).square().mean()) == pytest.approx(0.25, rel=0.05)


def test_ridge_is_the_posterior_mean_of_a_normal_prior() -> None:
    x, y = rand(4, 6, 3), rand(4, 6)
    found = ridge_icl(x, y, 0.5)
    for b, k in itertools.product(range(4), range(6)):
        # Conditioning the joint normal of the answers, not the normal equations.
        before = x[b, :k]
        covariance = before @ before.T + 0.25 * torch.eye(k, dtype=torch.float64)
        expected = x[b, k] @ before.T @ torch.linalg.solve(covariance, y[b, :k]) if k else torch.tensor(0.0)
        assert float(found[b, k]) == pytest.approx(float(expected), abs=1e-9)


def test_prompts_come_from_the_pool_or_are_new() -> None:
    data = ICLRegression(3, 5, 2, 0.5, seed=4)
    _, _, weights = data.sample(30, generator)
    assert {tuple(w.tolist()) for w in weights} == {tuple(w.tolist()) for w in data.pool}
    assert len({tuple(w.tolist()) for w in data.sample(30, generator, new=True)[2]}) == 30
    with pytest.raises(InputError, match="above 0"):
        ICLRegression(3, 5, 0)


# Memorisation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "context"), [(1, 2), (3, 2), (2, 4), (4, 4), (2, 8)])
def test_random_heads_give_the_bound_of_independent_features_and_no_more(heads: int, context: int) -> None:
    bound = capacity_bound(heads, context, 16)
    assert bound == heads * (context - 1) + 1
    assert feature_rank(heads, context, 80) == bound
    assert feature_rank(heads, context, bound - 1) == bound - 1


def test_a_memorizer_is_its_formula() -> None:
    layer = AttentionMemorizer(5, 2, 3, copies=2).double()
    tokens, queries = rand(2, 4, 5), rand(2, 7, 5)
    found = layer(tokens, queries)
    for c, n in itertools.product(range(2), range(7)):
        expected = layer.bias[c, 0]
        for h in range(2):
            logits = tokens[c] @ layer.key[c, h] @ layer.query[c, h].T @ queries[c, n] / 3**0.5
            expected = expected + logits.softmax(0) @ tokens[c] @ layer.value[c, h]
        torch.testing.assert_close(found[c, n], expected)
    assert memorised(1, 2, [1, 40], steps=150).max() >= 1


# Clustering heads ---------------------------------------------------------------------------------------------------


def test_the_task_and_a_network_with_a_clustering_head_made_by_hand() -> None:
    task = SparseModularAddition(2, 6, 3)
    assert task.clusters == 4
    assert SparseModularAddition().clusters == 6
    tokens, targets = task.sample(200, 0)
    assert targets.tolist() == [sum(row[:3]) % 2 for row in tokens.tolist()]
    network = TinyVisualTransformer(task, runs=1)
    with torch.no_grad():
        # Relevant positions lie along the query, the others against it; tokens move a little to both sides of it.
        network.position.copy_(torch.tensor([[[1.0, 0.0]] * 3 + [[-1.0, 0.0]] * 3]))
        network.token.copy_(torch.tensor([[[0.0, 0.3], [0.0, -0.3]]]))
        network.query.copy_(torch.tensor([[50.0, 0.0]]))
        weights, points = network.attend(tokens)
    torch.testing.assert_close(weights[0, :, :3], torch.full((200, 3), 1 / 3), rtol=1e-4, atol=1e-6)
    assert cluster_count(points[0].double().numpy()) == task.clusters
    same = tokens[:, :3].sum(1) == 1
    assert points[0, same].std(0).max() < 1e-5


def test_clusters_are_counted_and_training_leaves_snapshots() -> None:
    spots = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    crowd = np.repeat(spots, 20, 0) + np.random.default_rng(0).normal(0, 1e-4, (60, 2))
    assert cluster_count(crowd) == 3
    assert cluster_count(np.zeros((5, 2))) == 1
    _, snapshots = train(SparseModularAddition(2, 4, 2), 2, 40, sequences=64, every=20)
    assert [each.step for each in snapshots] == [0, 20, 40]
    assert snapshots[-1].loss.shape == (2,)
    assert (snapshots[-1].loss < snapshots[0].loss).all()


# The room -----------------------------------------------------------------------------------------------------------


def test_every_experiment_is_a_claim_of_the_same_code() -> None:
    import importlib

    assert len(experiments()) == 6
    for id, experiment in experiments().items():
        assert id in claim_ids()
        assert importlib.import_module(f"polyhead.claims.{id.replace('-', '_')}").run is experiment.run
    with pytest.raises(InputError, match="No experiment 'alchemy'"):
        find("alchemy")


def test_an_experiment_runs_and_draws_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyhead.cli.app import app

    runner, plot = CliRunner(), tmp_path / "plot.png"
    listed = json.loads(runner.invoke(app, ["lab", "list", "--json"]).stdout)
    assert {row["id"] for row in listed} == set(experiments())
    pytest.importorskip("matplotlib")
    kept = {"sizes": [2, 15], "divergence": [[0.5, 0.4], [0.001, 0.002]]}
    evidence = Evidence({"a": 0.5}, {"b": 0.1}, "much", (0.3, 0.5), "supported", "a", details=kept)
    experiment = base.Experiment(
        "low-rank-bottleneck", "How?", lambda scale, seed: evidence, find("low-rank-bottleneck").draw
    )
    monkeypatch.setattr("polyhead.lab.find", lambda id: experiment)
    done = runner.invoke(app, ["lab", "run", "low-rank-bottleneck", "--out", str(plot), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verdict"] == "supported"
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = runner.invoke(app, ["lab", "run", "low-rank-bottleneck"])
    assert "supported: a [0.3, 0.5]" in shown.output
    wrong = runner.invoke(app, ["lab", "run", "low-rank-bottleneck", "--out", "plot.bmp"])
    assert isinstance(wrong.exception, InputError)
