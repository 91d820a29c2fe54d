"""Rank in attention: one full-rank head looks up a nearest neighbour, many low-rank heads do not (arXiv 2407.16153)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from polyhead.claims._tiny_tasks import seed_interval
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.errors import InputError
from polyhead.lab.base import Experiment
from polyhead.papers import paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "RankLimitedAttention", "neighbour_error", "neighbours"]

_DIM = 16


@paper("rank-in-attention")
class RankLimitedAttention(nn.Module):
    """Attention of one query over a set: ``sum_h O_h V_h^T X softmax(X^T K_h Q_h^T y)``, all four of ``rank`` columns.

    One head of full rank with ``Q_h K_h^T = b I`` and ``O_h V_h^T = I`` gives the nearest neighbour as ``b`` grows.

    Args:
        dim: of the vectors.
        rank: of each head's query-key and value-output forms.
        heads: how many.
        layers: how many times the query is looked up again, its answer added to it.

    Example:
        >>> layer = RankLimitedAttention(16, rank=4, heads=4)
        >>> layer(torch.randn(3, 8, 16), torch.randn(3, 16)).shape
        torch.Size([3, 16])
    """

    def __init__(self, dim: int, rank: int, heads: int, *, layers: int = 1) -> None:
        super().__init__()
        if min(dim, rank, heads, layers) < 1 or rank > dim:
            raise InputError(f"rank={rank}, heads={heads}, layers={layers}: expected at least 1, and rank <= {dim}.")
        shape = (layers, heads, dim, rank)
        self.query, self.key, self.value, self.output = (
            nn.Parameter(torch.randn(shape) / scale**0.5) for scale in (rank**0.5, rank**0.5, dim, heads * rank)
        )

    def forward(self, points: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """``[batch, dim]`` from points ``[batch, n, dim]`` and queries ``[batch, dim]``."""
        state, answer = query, torch.zeros_like(query)
        for layer in range(len(self.query)):
            asked = torch.einsum("bd,hdr->bhr", state, self.query[layer])
            keys = torch.einsum("bnd,hdr->bhnr", points, self.key[layer])
            weights = torch.einsum("bhr,bhnr->bhn", asked, keys).softmax(-1)
            mixed = torch.einsum("bhn,bnd->bhd", weights, points)
            answer = torch.einsum("bhd,hdr,her->be", mixed, self.value[layer], self.output[layer])
            state = state + answer
        return answer


def neighbours(count: int, points: int, dim: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    """Points ``[count, points, dim]`` and queries ``[count, dim]`` on the sphere, and each query's nearest point."""
    drawn = torch.randn(count, points + 1, dim, generator=generator)
    drawn = drawn / drawn.norm(dim=-1, keepdim=True)
    around, query = drawn[:, :-1], drawn[:, -1]
    nearest = torch.einsum("bnd,bd->bn", around, query).argmax(1)
    return around, query, around[torch.arange(count), nearest]


@paper("rank-in-attention")
def neighbour_error(
    rank: int, heads: int, points: int, *, layers: int = 1, steps: int = 1_000, seed: int = 0, dim: int = _DIM
) -> float:
    """Mean squared distance from the nearest neighbour after training, 0 the best; answering nothing has 1."""
    torch.manual_seed(seed)
    layer = RankLimitedAttention(dim, rank, heads, layers=layers)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        around, query, nearest = neighbours(128, points, dim, generator)
        loss = (layer(around, query) - nearest).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        around, query, nearest = neighbours(2_000, points, dim, torch.Generator().manual_seed(10_000 + seed))
        return float((layer(around, query) - nearest).square().sum(1).mean())


def _run(scale: Scale, seed: int) -> Evidence:
    """Error of nearest-neighbour look-up with equally many weights shared out over more and thinner heads."""
    smoke = scale == "smoke"
    seeds = range(seed, seed + 3)
    splits = [(16, 1), (4, 4), (1, 16)]
    plans = [(points, 1) for points in ((8,) if smoke else (2, 8, 32))]
    plans += [] if smoke else [(points, 2) for points in (2, 32)]
    steps = 300 if smoke else 500
    found = {
        (points, layers, rank): [
            neighbour_error(rank, heads, points, layers=layers, steps=steps, seed=each) for each in seeds
        ]
        for points, layers in plans
        for rank, heads in splits
    }
    gap = seed_interval([low - high for low, high in zip(found[8, 1, 1], found[8, 1, 16], strict=True)])
    more = {}
    if not smoke:  # four times the heads: what adding low-rank heads recovers
        more = {
            rank: [neighbour_error(rank, 64 // rank, 8, steps=steps, seed=each) for each in seeds] for rank in (1, 4)
        }
    return Evidence(
        measured={
            f"error, {points} points, {layers} layer{'s' * (layers > 1)}, {16 // rank} heads of rank {rank}": float(
                np.mean(values)
            )
            for (points, layers, rank), values in found.items()
            if rank < 16
        }
        | {
            f"error, 8 points, 1 layer, {64 // rank} heads of rank {rank}": float(np.mean(v))
            for rank, v in more.items()
        },
        baseline={
            f"error, {points} points, {layers} layer{'s' * (layers > 1)}, 1 head of rank 16": float(np.mean(values))
            for (points, layers, rank), values in found.items()
            if rank == 16
        },
        expected="at equally many weights 16 heads of rank 1 are at least 0.1 worse than one head of rank 16; four "
        "times the heads recover little; a second layer helps more at 2 points than at 32",
        interval=(gap.low, gap.high),
        verdict=verdict_of(gap.low, gap.high, more_than=0.1),
        decides="error of 16 heads of rank 1 above one of rank 16, 8 points",
        data=f"nearest of random points on the sphere in {_DIM} dimensions, {len(seeds)} seeds",
        model=f"one or two layers, rank x heads = 16, {steps} steps of Adam",
        notes="Trained errors are upper bounds: more steps may train a thin head to less. Answering 0 has 1.",
        details={
            "rows": [
                {"points": points, "layers": layers, "rank": rank, "errors": values}
                for (points, layers, rank), values in found.items()
            ]
        },
    )


def _draw(evidence: Evidence, figure: Figure) -> None:
    axes = figure.subplots()
    rows = evidence.details["rows"]
    for points, layers in dict.fromkeys((row["points"], row["layers"]) for row in rows):
        some = sorted((r["rank"], np.mean(r["errors"])) for r in rows if (r["points"], r["layers"]) == (points, layers))
        label = f"{points} points, {layers} layer{'s' * (layers > 1)}"
        axes.plot(*zip(*some, strict=True), "o-" if layers == 1 else "s--", label=label)
    axes.set(xlabel="rank of a head (rank x heads = 16)", ylabel="squared distance from the neighbour", xscale="log")
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.legend()


EXPERIMENT = Experiment("rank-in-attention", "Can many thin heads do what one full-rank head does?", _run, _draw)
