"""Memorisation: how many labels one layer of attention can fit, in heads and in context (arXiv 2306.02010)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.errors import InputError
from polyhead.evaluate.statistics import bootstrap_of
from polyhead.lab.base import Experiment
from polyhead.papers import paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "AttentionMemorizer", "capacity_bound", "feature_rank", "memorised"]

_DIM, _HEAD = 16, 16


def capacity_bound(heads: int, context: int, head_dim: int) -> int:
    """``H (r - 1) + 1`` with ``r`` the smaller of context and head size: examples that a layer fits for certain."""
    return heads * (min(context, head_dim) - 1) + 1


@paper("mha-memorization")
class AttentionMemorizer(nn.Module):
    """Several attention layers with a linear read-out at once: one answer a query, ``w + sum_h v_h^T X p_h(query)``.

    ``p_h = softmax(X K_h Q_h^T query / sqrt(head_dim))``; value, output and read-out of a head are one vector ``v_h``,
    as no non-linearity stands between them. The tokens ``X`` are shared by all examples, the hard case of the theorem:
    an example is told from another by its query alone.

    Args:
        dim, heads, head_dim: widths. copies: layers that are trained side by side, each on its own data.

    Example:
        >>> AttentionMemorizer(16, heads=2, copies=3)(torch.randn(3, 4, 16), torch.randn(3, 10, 16)).shape
        torch.Size([3, 10])
    """

    def __init__(self, dim: int, heads: int, head_dim: int = _HEAD, *, copies: int = 1) -> None:
        super().__init__()
        if min(dim, heads, head_dim, copies) < 1:
            raise InputError(f"dim={dim}, heads={heads}, head_dim={head_dim}, copies={copies}: expected at least 1.")
        self.query = nn.Parameter(torch.randn(copies, heads, dim, head_dim) / dim**0.5)
        self.key = nn.Parameter(torch.randn(copies, heads, dim, head_dim) / dim**0.5)
        self.value = nn.Parameter(torch.randn(copies, heads, dim) / (heads * dim) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(copies, 1))

    def patterns(self, tokens: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """``[copies, heads, examples, context]``; tokens ``[copies, context, dim]``, queries ``[copies, n, dim]``."""
        asked = torch.einsum("cnd,chde->chne", queries, self.query)
        keys = torch.einsum("cld,chde->chle", tokens, self.key)
        return (asked @ keys.mT / self.query.shape[-1] ** 0.5).softmax(-1)

    def forward(self, tokens: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """Answers ``[copies, examples]``."""
        read = torch.einsum("cld,chd->chl", tokens, self.value)
        return torch.einsum("chnl,chl->cn", self.patterns(tokens, queries), read) + self.bias


@paper("mha-memorization")
def feature_rank(heads: int, context: int, examples: int, *, head_dim: int = _HEAD, seed: int = 0) -> int:
    """Numerical rank of what the read-out sees of random heads on shared tokens: examples it fits without training.

    The patterns of a head sum to 1, so that ``H`` heads give ``H (context - 1) + 1`` independent features at most.
    """
    torch.manual_seed(seed)
    layer = AttentionMemorizer(_DIM, heads, head_dim).double()
    with torch.no_grad():
        layer.query.mul_(3.0)  # sharp enough that features are not dependent to rounding
        patterns = layer.patterns(
            torch.randn(1, context, _DIM, dtype=torch.float64), torch.randn(1, examples, _DIM, dtype=torch.float64)
        )
    features = patterns[0].permute(1, 0, 2).reshape(examples, -1)
    return int(torch.linalg.matrix_rank(features, rtol=1e-9))


@paper("mha-memorization")
def memorised(
    heads: int, context: int, counts: list[int], *, copies: int = 3, steps: int = 600, seed: int = 0
) -> np.ndarray:
    """The largest of ``counts`` examples whose random real labels a layer fits to 1% of their variance, ``[copies]``.

    Every count is trained side by side with the others, on the first so many examples. Labels are of unit variance.
    """
    generator = torch.Generator().manual_seed(seed)
    trained, most = len(counts) * copies, max(counts)
    tokens = torch.randn(copies, context, _DIM, generator=generator).repeat(len(counts), 1, 1)
    queries = torch.randn(copies, most, _DIM, generator=generator).repeat(len(counts), 1, 1)
    labels = torch.randn(copies, most, generator=generator).repeat(len(counts), 1)
    used = (torch.arange(most) < torch.tensor(counts).repeat_interleave(copies)[:, None]).float()
    torch.manual_seed(seed)
    layer = AttentionMemorizer(_DIM, heads, copies=trained)
    optimizer = torch.optim.Adam(layer.parameters(), 2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps + 1):
        error = ((layer(tokens, queries) - labels).square() * used).sum(1) / used.sum(1)
        if step < steps:
            optimizer.zero_grad()
            error.sum().backward()
            optimizer.step()
            schedule.step()
    fitted = (error.detach() < 0.01).reshape(len(counts), copies).numpy()
    return np.array([max([0, *(n for n, good in zip(counts, line, strict=True) if good)]) for line in fitted.T])


def _run(scale: Scale, seed: int) -> Evidence:
    """The most random labels a trained layer fits, against heads times context."""
    smoke = scale == "smoke"
    contexts, numbers = ((2, 4), (1, 2, 4)) if smoke else ((2, 4, 8), (1, 2, 4, 8))
    grid = [(heads, context) for context in contexts for heads in numbers]
    rows = []
    for heads, context in grid:
        bound = capacity_bound(heads, context, _HEAD)
        counts = sorted({max(1, round(bound * factor)) for factor in (1, 2, 3, 4, 6, 8, 12, 16)})
        found = memorised(heads, context, counts, steps=400 if smoke else 500, seed=seed)
        rows += [{"heads": heads, "context": context, "bound": bound, "fitted": int(n)} for n in found]
    product = np.array([row["heads"] * row["context"] for row in rows], dtype=float)
    fitted = np.array([row["fitted"] for row in rows], dtype=float)
    bounds = np.array([row["bound"] for row in rows])
    explained = bootstrap_of(lambda at: float(np.corrcoef(product[at], fitted[at])[0, 1] ** 2), len(rows), seed=seed)
    ranks = {context: feature_rank(4, context, 200, seed=seed) for context in (2, 4, 8)}
    return Evidence(
        measured={
            "R^2 of labels fitted and heads x context": explained.value,
            "share of runs that fit at least H (n - 1) + 1": float((fitted >= bounds).mean()),
            "labels fitted over the bound, median": float(np.median(fitted / bounds)),
        },
        baseline={f"features of 4 random heads, context {context}": float(rank) for context, rank in ranks.items()},
        expected="the number of labels fitted grows in proportion to heads x context (R^2 above 0.9), and random heads "
        "already give H (n - 1) + 1 independent features: 5, 13 and 29",
        interval=(explained.low, explained.high),
        verdict=verdict_of(explained.low, explained.high, more_than=0.9),
        decides="R^2 of labels fitted and heads x context",
        data=f"random queries of {_DIM} features on shared random tokens, random real labels, 3 seeds a setting",
        model=f"one attention layer of heads of {_HEAD} with linear read-out, trained by Adam",
        notes="Labels fitted by gradient are a lower bound on capacity. Counts tried are multiples of the bound, which "
        "makes the largest a coarse number.",
        details={"rows": rows},
    )


def _draw(evidence: Evidence, figure: Figure) -> None:
    axes = figure.subplots()
    rows = evidence.details["rows"]
    for context in sorted({row["context"] for row in rows}):
        some = [(row["heads"] * context, row["fitted"]) for row in rows if row["context"] == context]
        axes.plot(*zip(*some, strict=True), "o", label=f"context {context}", alpha=0.7)
    bound = sorted({(row["heads"] * row["context"], row["bound"]) for row in rows})
    axes.plot(*zip(*bound, strict=True), "k:", label="H (n - 1) + 1")
    axes.set(xlabel="heads x context", ylabel="random labels fitted", xscale="log", yscale="log")
    axes.legend()


EXPERIMENT = Experiment("mha-memorization", "How many labels can the heads of one layer remember?", _run, _draw)
