"""Clustering heads: attention that makes all sequences of one count a single point (arXiv 2410.24050)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.errors import InputError
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.lab.base import Experiment
from polyhead.papers import paper

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["EXPERIMENT", "Snapshot", "SparseModularAddition", "TinyVisualTransformer", "cluster_count", "train"]

_SEQUENCES = 512


@paper("clustering-heads")
@dataclass(frozen=True)
class SparseModularAddition:
    """Sequences of ``length`` tokens in Z/p; the target is the sum of the first ``relevant`` modulo ``p``."""

    p: int = 2
    length: int = 12
    relevant: int = 5

    def sample(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens ``[count, length]`` and targets ``[count]``, int64."""
        if not 1 <= self.relevant <= self.length or self.p < 2:
            raise InputError(f"{self}: expected p of at least 2 and 1 <= relevant <= length.")
        tokens = torch.randint(self.p, (count, self.length), generator=torch.Generator().manual_seed(seed))
        return tokens, tokens[:, : self.relevant].sum(1) % self.p

    @property
    def clusters(self) -> int:
        """How many points are enough: the ways to count ``relevant`` tokens of ``p`` kinds."""
        kinds = range(self.relevant + 1)
        return sum(sum(counts) == self.relevant for counts in itertools.product(kinds, repeat=self.p))


@paper("clustering-heads")
class TinyVisualTransformer(nn.Module):
    """A transformer one can draw: embeddings in the plane, one learned query, a value map, an MLP. ``runs`` at once.

    Token and position embeddings are added and normalised to length 1; their inner products with the query, through
    softmax, weigh their values.

    Args:
        task: gives the sizes. hidden: units of the MLP. runs: independent networks, each with its own beginning.

    Example:
        >>> network = TinyVisualTransformer(SparseModularAddition(), runs=3)
        >>> network(torch.zeros(8, 12, dtype=torch.int64)).shape
        torch.Size([3, 8, 2])
    """

    def __init__(self, task: SparseModularAddition, *, hidden: int = 32, runs: int = 1) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(runs, task.p, 2))
        self.position = nn.Parameter(torch.randn(runs, task.length, 2))
        self.query = nn.Parameter(torch.randn(runs, 2))
        self.value = nn.Parameter(torch.randn(runs, 2, 2) / 2**0.5)
        self.enter = nn.Parameter(torch.randn(runs, 2, hidden))
        self.shift = nn.Parameter(torch.randn(runs, 1, hidden))
        self.leave = nn.Parameter(torch.randn(runs, hidden, task.p) / hidden**0.5)

    def attend(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention ``[runs, batch, length]`` and the points ``[runs, batch, 2]`` that go to the MLP."""
        embedded = F.normalize(self.token[:, tokens] + self.position[:, None], dim=-1)
        weights = torch.einsum("rblc,rc->rbl", embedded, self.query).softmax(-1)
        return weights, torch.einsum("rbl,rblc,rcd->rbd", weights, embedded, self.value)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``[runs, batch, p]`` of tokens ``[batch, length]``."""
        _, points = self.attend(tokens)
        return F.gelu(points @ self.enter + self.shift) @ self.leave


@dataclass(frozen=True)
class Snapshot:
    """What the networks were at a step; every array ``[runs]``.

    Attributes:
        accuracy: on the test sequences.
        mass: of attention on the relevant positions, mean over sequences.
        evenness: entropy of the attention among these over its maximum.
        clusters: :func:`cluster_count` of the points.
    """

    step: int
    loss: np.ndarray
    accuracy: np.ndarray
    mass: np.ndarray
    evenness: np.ndarray
    clusters: np.ndarray


def cluster_count(points: np.ndarray, tolerance: float = 0.05) -> int:
    """Groups of points ``[n, 2]`` that lie nearer than ``tolerance`` of their spread to one another, chained."""
    from scipy.cluster.hierarchy import fcluster, linkage

    spread = float(np.linalg.norm(points - points.mean(0), axis=1).max())
    if spread == 0 or len(points) < 2:
        return 1
    return int(fcluster(linkage(points, "single"), tolerance * spread, "distance").max())


@paper("clustering-heads")
def train(
    task: SparseModularAddition, runs: int, steps: int, *, sequences: int = 2_048, every: int = 50, seed: int = 0
) -> tuple[TinyVisualTransformer, list[Snapshot]]:
    """Full-batch Adam on ``sequences`` sequences, ``runs`` networks side by side; a snapshot ``every`` some steps."""
    torch.manual_seed(seed)
    network = TinyVisualTransformer(task, runs=runs)
    tokens, targets = task.sample(sequences, seed)
    test = task.sample(512, seed + 1_000_000)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    snapshots = []
    for step in range(steps + 1):
        logits = network(tokens)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.repeat(runs), reduction="none").reshape(runs, -1).mean(1)
        if step % every == 0:
            snapshots.append(_snapshot(network, task, test, step, losses.detach().numpy()))
        if step < steps:
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
    return network, snapshots


@torch.no_grad()
def _snapshot(
    network: TinyVisualTransformer,
    task: SparseModularAddition,
    test: tuple[torch.Tensor, torch.Tensor],
    step: int,
    loss: np.ndarray,
) -> Snapshot:
    tokens, targets = test
    weights, points = network.attend(tokens)
    on = weights[..., : task.relevant]
    mass = on.sum(-1)
    share = on / mass[..., None].clamp_min(1e-12)
    entropy = -(share * share.clamp_min(1e-12).log()).sum(-1) / np.log(max(2, task.relevant))
    return Snapshot(
        step,
        loss.copy(),
        (network(tokens).argmax(-1) == targets).float().mean(1).numpy(),
        mass.mean(1).numpy(),
        entropy.mean(1).numpy(),
        np.array([cluster_count(each) for each in points.double().numpy()]),
    )


def _run(scale: Scale, seed: int) -> Evidence:
    """Accuracy, attention on the relevant positions and clusters of many networks while they learn."""
    smoke = scale == "smoke"
    runs, steps = (6, 900) if smoke else (10, 2_000)
    task = SparseModularAddition()
    network, snapshots = train(task, runs, steps, sequences=_SEQUENCES, every=steps // 20, seed=seed)
    accuracy, mass = (np.array([getattr(each, name) for each in snapshots]) for name in ("accuracy", "mass"))
    evenness, clusters = (np.array([getattr(each, name) for each in snapshots]) for name in ("evenness", "clusters"))
    solved = accuracy[-1] > 0.99
    settled = bootstrap_interval(mass[-1][solved], seed=seed) if solved.sum() >= 2 else None
    first = [_first(mass[:, run] > 0.9) <= _first(accuracy[:, run] > 0.9) for run in np.flatnonzero(solved)]
    with torch.no_grad():
        tokens, targets = task.sample(256, seed + 1_000_000)
        points = network.attend(tokens)[1][int(accuracy[-1].argmax())]

    def mean(values: np.ndarray, which: np.ndarray) -> float:
        return float(values[-1][which].mean()) if which.any() else float("nan")

    measured = {
        "networks that solve the task": float(solved.mean()),
        "attention on the relevant positions, solved": mean(mass, solved),
        "evenness there, solved": mean(evenness, solved),
        "clusters, solved": float(np.median(clusters[-1][solved])) if solved.any() else float("nan"),
        "share where attention settled before accuracy": float(np.mean(first)) if first else float("nan"),
    }
    return Evidence(
        measured={name: value for name, value in measured.items() if np.isfinite(value)},
        baseline={
            name: value
            for name, value in {
                "attention on the relevant positions, unsolved": mean(mass, ~solved),
                "clusters, unsolved": float(np.median(clusters[-1][~solved])) if (~solved).any() else float("nan"),
                "attention there before training": float(mass[0].mean()),
            }.items()
            if np.isfinite(value)
        },
        expected="networks that solve the task put more than 0.95 of their attention on the 5 positions, evenly, make "
        f"{task.clusters} clusters, and do so before they are accurate; the others do not",
        interval=None if settled is None else (settled.low, settled.high),
        verdict="inconclusive" if settled is None else verdict_of(settled.low, settled.high, more_than=0.95),
        decides="attention on the relevant positions, solved",
        data=f"p=2, 12 tokens of which 5 count, {_SEQUENCES} sequences",
        model=f"{runs} networks in the plane, {steps} steps of Adam on all sequences",
        notes="Inconclusive where fewer than two networks solve the task. The interval is over those that do.",
        details={
            "steps": [each.step for each in snapshots],
            "accuracy": accuracy.tolist(),
            "mass": mass.tolist(),
            "clusters": clusters.tolist(),
            "loss": [each.loss.tolist() for each in snapshots],
            "points": points.tolist(),
            "targets": targets.tolist(),
        },
    )


def _first(reached: np.ndarray) -> int:
    return int(reached.argmax()) if reached.any() else len(reached)


def _draw(evidence: Evidence, figure: Figure) -> None:
    left, middle, right = figure.subplots(1, 3)
    steps, shown = evidence.details["steps"], evidence.details
    left.plot(steps, shown["accuracy"], color="C0", alpha=0.5)
    left.set(xlabel="step", ylabel="test accuracy")
    middle.plot(steps, shown["mass"], color="C1", alpha=0.5)
    middle.set(xlabel="step", ylabel="attention on the 5 positions", ylim=(0, 1.05))
    points = np.array(shown["points"])
    right.scatter(points[:, 0], points[:, 1], c=shown["targets"], cmap="coolwarm", s=14)
    right.set(xticks=[], yticks=[])
    right.set_title("points that go to the MLP", fontsize=10)


EXPERIMENT = Experiment("clustering-heads", "Do heads cluster what means the same before it is labelled?", _run, _draw)
