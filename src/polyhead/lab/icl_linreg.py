"""In-context linear regression: what heads of softmax attention learn, and how it scales (arXiv 2503.12734)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.errors import InputError
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.lab.base import Experiment
from polyhead.papers import paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "LinearICLAttention", "debiased_step", "regression_prompts", "ridge_predictions"]

_DIM, _LENGTH, _NOISE = 5, 40, 0.1


@paper("icl-linreg-softmax")
class LinearICLAttention(nn.Module):
    """One attention layer that reads pairs ``(x, y)`` and a question ``x_q`` and answers ``y_q``.

    Head ``h`` weighs the pairs by ``softmax_l((x_l, y_l)^T KQ_h x_q)`` and adds ``OV_h^T (x_l, y_l)`` of their mean.

    Args:
        dim: of ``x``.
        heads: how many.
        softmax: False divides the scores by their number and leaves them as they are: linear attention.

    Attributes:
        key_query: ``[heads, dim + 1, dim]``; output_value: ``[heads, dim + 1]``.

    Example:
        >>> layer = LinearICLAttention(5, heads=2)
        >>> layer(torch.randn(3, 40, 5), torch.randn(3, 40), torch.randn(3, 5)).shape
        torch.Size([3])
    """

    def __init__(self, dim: int, heads: int, *, softmax: bool = True) -> None:
        super().__init__()
        if dim < 1 or heads < 1:
            raise InputError(f"dim={dim} and heads={heads} were given, expected at least 1.")
        self.softmax = softmax
        self.key_query = nn.Parameter(0.1 * torch.randn(heads, dim + 1, dim))
        self.output_value = nn.Parameter(0.1 * torch.randn(heads, dim + 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor, question: torch.Tensor) -> torch.Tensor:
        """Answers ``[batch]`` from ``x [batch, length, dim]``, ``y [batch, length]`` and ``question [batch, dim]``."""
        pairs = torch.cat([x, y[..., None]], -1)
        asked = torch.einsum("hed,bd->bhe", self.key_query, question)
        scores = asked @ pairs.mT
        weights = scores.softmax(-1) if self.softmax else scores / x.shape[1]
        return ((weights @ pairs) * self.output_value).sum((1, 2))

    def form(self) -> dict[str, float]:
        """How near the layer is to the paper's form, numbers of the heads that matter (weight on ``y`` over a tenth).

        Returns:
            ``off-diagonal``: mean size of the other entries of ``KQ`` over that of its diagonal; ``sum of mu``: of the
            heads' weights on ``y``, over the largest one's size.
        """
        mu, block = self.output_value[:, -1].detach(), self.key_query.detach()[:, :-1]
        active = mu.abs() > 0.1 * mu.abs().max()
        diagonal = block.diagonal(dim1=1, dim2=2).abs().mean(1)
        off = (block.abs().sum((1, 2)) - diagonal * block.shape[1]) / (block[0].numel() - block.shape[1])
        ratio = (off / diagonal)[active].mean()
        return {"off-diagonal": float(ratio), "sum of mu": float(mu.sum().abs() / mu.abs().max())}


Prompt = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def regression_prompts(count: int, length: int, dim: int, noise: float, generator: torch.Generator) -> Prompt:
    """``x [count, length, dim]``, ``y = x w + noise``, a question and its answer without noise; ``|w|`` is about 1."""
    weights = torch.randn(count, dim, generator=generator) / dim**0.5
    x = torch.randn(count, length + 1, dim, generator=generator)
    y = torch.einsum("bld,bd->bl", x, weights)
    noisy = y[:, :-1] + noise * torch.randn(count, length, generator=generator)
    return x[:, :-1], noisy, x[:, -1], y[:, -1]


def debiased_step(x: torch.Tensor, y: torch.Tensor, question: torch.Tensor, rate: float = 1.0) -> torch.Tensor:
    """``rate / L sum_l (y_l - mean y) (x_l - mean x)^T x_q``: one step of gradient descent from 0 on centred pairs."""
    centred_x, centred_y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    return rate * torch.einsum("bl,bld,bd->b", centred_y, centred_x, question) / x.shape[1]


def ridge_predictions(x: torch.Tensor, y: torch.Tensor, question: torch.Tensor, penalty: float) -> torch.Tensor:
    """Answers ``[batch]`` of ridge regression; with ``penalty = dim noise^2`` the best there are for these prompts."""
    gram = x.mT @ x + penalty * torch.eye(x.shape[-1], dtype=x.dtype)
    weights: torch.Tensor = torch.linalg.solve(gram, (x.mT @ y[..., None]))[..., 0]
    return (weights * question).sum(-1)


def _trained(heads: int, softmax: bool, steps: int, seed: int) -> LinearICLAttention:
    torch.manual_seed(seed)
    layer = LinearICLAttention(_DIM, heads, softmax=softmax)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, y, question, answer = regression_prompts(256, _LENGTH, _DIM, _NOISE, generator)
        loss = (layer(x, y, question) - answer).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return layer


def _run(scale: Scale, seed: int) -> Evidence:
    """Errors of one, two and four heads, linear attention, a gradient step and ridge; form of heads; longer prompts."""
    smoke = scale == "smoke"
    steps, seeds = (800, range(seed, seed + 1)) if smoke else (3_000, range(seed, seed + 3))
    plans = {"1 head": (1, True), "2 heads": (2, True), "linear attention": (1, False)}
    if not smoke:
        plans["4 heads"] = (4, True)
    layers = {name: [_trained(*plan, steps, each) for each in seeds] for name, plan in plans.items()}
    lengths = (_LENGTH, 2 * _LENGTH, 4 * _LENGTH)
    errors: dict[int, dict[str, np.ndarray]] = {}
    for length in lengths:
        x, y, question, answer = regression_prompts(
            4_000, length, _DIM, _NOISE, torch.Generator().manual_seed(seed + 999)
        )
        with torch.no_grad():
            given = {name: [layer(x, y, question) for layer in made] for name, made in layers.items()}
        given["ridge"] = [ridge_predictions(x, y, question, _DIM * _NOISE**2)]
        given["debiased step"] = [debiased_step(x, y, question, length / (length + _DIM + 1))]
        errors[length] = {
            name: torch.stack([(each - answer).square() for each in made]).mean(0).numpy()
            for name, made in given.items()
        }
    gap = bootstrap_interval(errors[_LENGTH]["1 head"] - errors[_LENGTH]["2 heads"], seed=seed)
    forms = [layer.form() for layer in layers["2 heads"]]
    means = {length: {name: float(values.mean()) for name, values in each.items()} for length, each in errors.items()}
    return Evidence(
        measured={
            "error of 2 heads": means[_LENGTH]["2 heads"],
            "error of 1 head less that of 2": gap.value,
            "off-diagonal over diagonal of KQ, 2 heads": float(np.mean([form["off-diagonal"] for form in forms])),
            "sum of mu over largest, 2 heads": float(np.mean([form["sum of mu"] for form in forms])),
            "2 heads, error at four times the length": means[lengths[-1]]["2 heads"],
        },
        baseline={
            **{f"error of {name}": value for name, value in means[_LENGTH].items() if name != "2 heads"},
            "linear attention, error at four times the length": means[lengths[-1]]["linear attention"],
        },
        expected="2 heads err less than 1; their KQ is nearly diagonal (ratio below 0.1) and their mu cancel; with "
        "longer prompts the error falls",
        interval=(gap.low, gap.high),
        verdict=verdict_of(gap.low, gap.high),
        decides="error of 1 head less that of 2",
        data=f"4,000 prompts of {_LENGTH} pairs, {_DIM} features, noise {_NOISE}, {len(seeds)} seed(s)",
        model=f"one attention layer, {steps} steps of Adam",
        notes="Inputs are isotropic. The interval is over prompts.",
        details={
            "errors": means,
            "2 heads by seed": [
                {**form, "error": float((layer(x, y, question) - answer).square().mean().detach())}
                for form, layer in zip(forms, layers["2 heads"], strict=True)
            ],
            "heads": [
                {"mu": layer.output_value[:, -1].tolist(), "key_query": layer.key_query[:, :-1].tolist()}
                for layer in layers["2 heads"][:1]
            ],
        },
    )


def _draw(evidence: Evidence, figure: Figure) -> None:
    left, first, second = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    errors = evidence.details["errors"]
    for name in errors[next(iter(errors))]:
        left.plot([int(length) for length in errors], [each[name] for each in errors.values()], "o-", label=name)
    left.set(xlabel="pairs in the prompt", ylabel="squared error", xscale="log", yscale="log")
    left.legend(fontsize=8)
    heads = evidence.details["heads"][0]
    for axes, mu, block in zip((first, second), heads["mu"], heads["key_query"], strict=True):
        most = max(1e-9, float(np.abs(block).max()))
        axes.imshow(block, cmap="RdBu", vmin=-most, vmax=most)
        axes.set_title(f"KQ of a head, mu {mu:.2f}", fontsize=9)


EXPERIMENT = Experiment("icl-linreg-softmax", "What do softmax heads do in in-context linear regression?", _run, _draw)
