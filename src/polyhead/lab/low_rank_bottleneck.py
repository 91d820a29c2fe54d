"""Low-rank bottleneck: a head narrower than the text is long cannot make every attention pattern (arXiv 2002.07028)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.errors import InputError
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.lab.base import Experiment
from polyhead.papers import paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "exact_head", "fit_heads"]

_TOKENS, _DIM = 16, 64


@paper("low-rank-bottleneck")
def exact_head(inputs: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A head that makes a given pattern exactly, without training (theorem 1 of the paper, by construction).

    Softmax forgets a constant a row, so that ``log target`` may be centred by rows, which leaves rank ``tokens - 1``
    at most. With inputs of full row rank the head's form is ``X^+ log(target) X^+T``, cut in two by singular values.

    Args:
        inputs: ``[tokens, dim]`` of rank ``tokens``.
        target: ``[tokens, tokens]`` positive rows that sum to 1.

    Returns:
        ``W_Q`` and ``W_K`` ``[dim, tokens - 1]`` with ``softmax(X W_Q W_K^T X^T) = target``.

    Raises:
        InputError: dependent inputs, or a target with a zero.
    """
    tokens = len(inputs)
    if int(torch.linalg.matrix_rank(inputs)) < tokens or target.shape != (tokens, tokens) or not (target > 0).all():
        raise InputError(
            f"Inputs {list(inputs.shape)} must have rank {tokens}, and a target {list(target.shape)} must be "
            f"[{tokens}, {tokens}] and positive: only these have an exact head."
        )
    logits = target.log()
    inverse = torch.linalg.pinv(inputs)
    left, values, right = torch.linalg.svd(inverse @ (logits - logits.mean(1, keepdim=True)) @ inverse.T)
    root = values[: tokens - 1].sqrt()
    return left[:, : tokens - 1] * root, right[: tokens - 1].T * root


@paper("low-rank-bottleneck")
def fit_heads(
    inputs: torch.Tensor, targets: torch.Tensor, head_dim: int, *, steps: int = 500, rate: float = 0.05, seed: int = 0
) -> np.ndarray:
    """Fit one head to each of several patterns on the same inputs, by gradient.

    Args:
        inputs: ``[tokens, dim]``; targets: ``[n, tokens, tokens]`` rows that sum to 1.
        head_dim: columns of ``W_Q`` and ``W_K``, so that logits have this rank at most.
        steps: of Adam; rate: at the beginning, it falls to 0.
        seed: of the first weights.

    Returns:
        ``[n]`` Kullback-Leibler divergence of each target from its head's pattern, mean over rows, in nats.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (2, len(targets), inputs.shape[1], head_dim)
    weights = (torch.randn(shape, generator=generator) / inputs.shape[1] ** 0.5).requires_grad_()
    optimizer = torch.optim.Adam([weights], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps + 1):
        queries, keys = inputs @ weights
        pattern = (queries @ keys.mT / head_dim**0.5).log_softmax(-1)
        divergence = (targets * (targets.clamp_min(1e-30).log() - pattern)).sum(-1).mean(-1)
        if step < steps:
            optimizer.zero_grad()
            divergence.sum().backward()
            optimizer.step()
            schedule.step()
    return divergence.detach().double().numpy()


def _run(scale: Scale, seed: int) -> Evidence:
    """Divergence of the best head of each size from random patterns of 16 tokens."""
    generator = torch.Generator().manual_seed(seed)
    count, steps = (12, 300) if scale == "smoke" else (40, 2_000)
    inputs = torch.randn(_TOKENS, _DIM, generator=generator)
    targets = (2 * torch.randn(count, _TOKENS, _TOKENS, generator=generator)).softmax(-1)
    sizes = (2, 4, 8, 12, 15, 16, 24)
    found = {size: fit_heads(inputs, targets, size, steps=steps, seed=seed) for size in sizes}
    gap = bootstrap_interval(found[4] - found[15], seed=seed)
    double = inputs.double()
    query, key = exact_head(double, targets[0].double())
    error = float(((double @ query @ key.T @ double.T).softmax(-1) - targets[0].double()).abs().max())
    return Evidence(
        measured={f"divergence, head size {size}": float(values.mean()) for size, values in found.items() if size < 15},
        baseline={
            **{f"divergence, head size {size}": float(values.mean()) for size, values in found.items() if size >= 15},
            "largest error of the exact head of size 15": error,
        },
        expected="heads of fewer than 15 numbers cannot make random patterns of 16 tokens (divergence of size 4 at "
        "least 0.1 nats above size 15), heads of 15 or more can",
        interval=(gap.low, gap.high),
        verdict=verdict_of(gap.low, gap.high, more_than=0.1) if found[15].mean() < 0.02 else "inconclusive",
        decides="divergence of head size 4 above 15",
        data=f"{count} random patterns of {_TOKENS} tokens on one input of {_DIM} features",
        model="one attention head",
        notes="Random patterns are the worst case; how far real heads use their rank is another question.",
        details={"sizes": list(sizes), "divergence": [values.tolist() for values in found.values()]},
    )


def _draw(evidence: Evidence, figure: Figure) -> None:
    axes = figure.subplots()
    sizes, values = evidence.details["sizes"], np.array(evidence.details["divergence"])
    axes.plot(sizes, np.maximum(values, 1e-9), ".", color="0.7")
    axes.plot(sizes, np.maximum(values.mean(1), 1e-9), "o-", color="C0", label="mean over patterns")
    axes.axvline(_TOKENS - 1, color="C3", linestyle=":", label="tokens - 1")
    axes.set(xlabel="head size", ylabel="divergence from the pattern, nats", yscale="log")
    axes.legend()


EXPERIMENT = Experiment("low-rank-bottleneck", "How wide must a head be to make any attention pattern?", _run, _draw)
