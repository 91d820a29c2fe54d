"""Task diversity: with few tasks a transformer remembers them, with many it learns to regress (arXiv 2306.15063)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from polyhead.attention import Attention, AttentionShape
from polyhead.claims._tiny_tasks import TinyTransformer
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.errors import InputError
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.lab.base import Experiment
from polyhead.papers import paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "ICLRegression", "dmmse", "ridge_icl"]

_DIM, _PAIRS, _SIGMA, _BATCH = 4, 8, 0.5, 64


@paper("task-diversity-icl")
class ICLRegression:
    """Prompts of pairs ``(x, y = w x + noise)`` whose ``w`` comes from a pool of ``tasks`` vectors, or is new.

    Args:
        dim: of ``x``; pairs: in a prompt; tasks: in the pool; sigma: of the noise.
        seed: of the pool.

    Attributes:
        pool: ``[tasks, dim]``, standard normal.
    """

    def __init__(self, dim: int = 8, pairs: int = 16, tasks: int = 64, sigma: float = 0.5, *, seed: int = 0) -> None:
        if min(dim, pairs, tasks) < 1 or sigma <= 0:
            raise InputError(f"dim={dim}, pairs={pairs}, tasks={tasks}, sigma={sigma}: expected all above 0.")
        self.dim, self.pairs, self.sigma = dim, pairs, sigma
        self.pool = torch.randn(tasks, dim, generator=torch.Generator().manual_seed(seed))

    def sample(
        self, count: int, generator: torch.Generator, *, new: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``x [count, pairs, dim]``, ``y [count, pairs]`` and ``w [count, dim]``, of the pool or ``new``."""
        if new:
            weights = torch.randn(count, self.dim, generator=generator)
        else:
            weights = self.pool[torch.randint(len(self.pool), (count,), generator=generator)]
        x = torch.randn(count, self.pairs, self.dim, generator=generator)
        noise = self.sigma * torch.randn(count, self.pairs, generator=generator)
        return x, torch.einsum("bkd,bd->bk", x, weights) + noise, weights


@paper("task-diversity-icl")
def dmmse(x: torch.Tensor, y: torch.Tensor, pool: torch.Tensor, sigma: float) -> torch.Tensor:
    """The best predictions for tasks drawn from a pool: ``w = sum_i softmax_i(-|y - X w_i|^2 / 2 sigma^2) w_i``.

    Returns:
        ``[batch, pairs]``: of each ``y`` from the pairs before it.
    """
    errors = (y[..., None] - x @ pool.T).square()
    before = torch.cumsum(errors, 1) - errors
    return ((-before / (2 * sigma**2)).softmax(-1) * (x @ pool.T)).sum(-1)


@paper("task-diversity-icl")
def ridge_icl(x: torch.Tensor, y: torch.Tensor, sigma: float) -> torch.Tensor:
    """The best predictions for new tasks: ridge regression with penalty ``sigma^2``, the posterior mean under N(0, I).

    Returns:
        ``[batch, pairs]``: of each ``y`` from the pairs before it.
    """
    outer, products = x[..., :, None] * x[..., None, :], x * y[..., None]
    gram = torch.cumsum(outer, 1) - outer + sigma**2 * torch.eye(x.shape[-1], dtype=x.dtype)
    weights: torch.Tensor = torch.linalg.solve(gram, (torch.cumsum(products, 1) - products)[..., None])[..., 0]
    return (weights * x).sum(-1)


def _tokens(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``[batch, 2 pairs, dim + 1 + 2 pairs]``: x and y in turn, each with a one-hot of its place."""
    count, pairs, dim = x.shape
    tokens = torch.zeros(count, 2 * pairs, dim + 1)
    tokens[:, ::2, :dim], tokens[:, 1::2, dim] = x, y
    return torch.cat([tokens, torch.eye(2 * pairs).expand(count, -1, -1)], -1)


def _trained(data: ICLRegression, width: int, layers: int, steps: int, seed: int) -> TinyTransformer:
    torch.manual_seed(seed)
    shape = AttentionShape(width, 4)
    model = TinyTransformer([Attention(shape, causal=True) for _ in range(layers)], data.dim + 1 + 2 * data.pairs, 1)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        x, y, _ = data.sample(_BATCH, generator)
        loss = (model(_tokens(x, y))[:, ::2, 0] - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def _run(scale: Scale, seed: int) -> Evidence:
    """Distance of transformers, trained on few and on many tasks, from both Bayes estimators on new tasks."""
    smoke = scale == "smoke"
    pools, steps = ((4, 2_048), 400) if smoke else ((4, 64, 2_048), 2_000)
    width, layers = (32, 2) if smoke else (48, 3)
    rows, lean = [], {}
    for tasks in pools:
        data = ICLRegression(_DIM, _PAIRS, tasks, _SIGMA, seed=seed)
        model = _trained(data, width, layers, steps, seed)
        row: dict[str, float] = {"tasks": tasks}
        for new in (False, True):
            x, y, _ = data.sample(2_000, torch.Generator().manual_seed(seed + 77), new=new)
            with torch.no_grad():
                given = model(_tokens(x, y))[:, ::2, 0]
            best = {"dmmse": dmmse(x, y, data.pool, _SIGMA), "ridge": ridge_icl(x, y, _SIGMA)}
            away = {name: (given - each).square().mean(1).numpy() for name, each in best.items()}
            if new:
                lean[tasks] = away["dmmse"] - away["ridge"]
            where = "new" if new else "pool"
            row |= {f"{where}, from {name}": float(each.mean()) for name, each in away.items()}
            row[f"{where}, error"] = float((given - y).square().mean())
            row |= {f"{where}, error of {name}": float((each - y).square().mean()) for name, each in best.items()}
        rows.append(row)
    few, many = (bootstrap_interval(lean[tasks], seed=seed) for tasks in (pools[0], pools[-1]))
    turn = bootstrap_interval(lean[pools[-1]] - lean[pools[0]], seed=seed)
    nearer = few.high < 0 < many.low
    return Evidence(
        measured={
            **{
                f"{row['tasks']} tasks, distance from {name}": row[f"new, from {name}"]
                for row in (rows[0], rows[-1])
                for name in ("dmmse", "ridge")
            },
            "turn from dmmse to ridge": turn.value,
        },
        baseline={f"{row['tasks']} tasks, error on new tasks": row["new, error"] for row in rows}
        | {"error of ridge on new tasks": rows[-1]["new, error of ridge"]},
        expected="on new tasks the transformer trained on 4 tasks is nearer to their Bayes estimator (dMMSE) than to "
        "ridge, and the one trained on 2,048 nearer to ridge; more tasks, less error on new ones",
        interval=(turn.low, turn.high),
        verdict=verdict_of(turn.low, turn.high) if nearer or turn.high < 0 else "inconclusive",
        decides="turn from dmmse to ridge",
        data=f"{_DIM} features, {_PAIRS} pairs, noise variance {_SIGMA**2}, 2,000 prompts",
        model=f"{layers} layers of width {width}, {steps} steps of {_BATCH} prompts",
        notes="Supported only where each of the two is nearer to its own estimator; the threshold of 2^14 tasks is for "
        "the paper's larger setting. The interval is over prompts.",
        details={"rows": rows},
    )


def _draw(evidence: Evidence, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    rows = evidence.details["rows"]
    tasks = [row["tasks"] for row in rows]
    for name in ("dmmse", "ridge"):
        left.plot(tasks, [row[f"new, from {name}"] for row in rows], "o-", label=f"from {name}")
    left.set(xlabel="tasks in training", ylabel="squared distance on new tasks", xscale="log", yscale="log")
    left.legend()
    for name, label in (("error", "transformer"), ("error of dmmse", "dmmse"), ("error of ridge", "ridge")):
        right.plot(tasks, [row[f"new, {name}"] for row in rows], "o-", label=label)
    right.set(xlabel="tasks in training", ylabel="squared error on new tasks", xscale="log", yscale="log")
    right.legend()


EXPERIMENT = Experiment("task-diversity-icl", "How many tasks turn remembering into regression?", _run, _draw)
