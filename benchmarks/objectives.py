"""Objectives: time and peak memory of a step (forward and backward) beside pytorch-metric-learning, and of 32k pairs.

Every step runs in a process of its own, so that its peak is its own: memory is the highest resident set during the step
less that before it. Times are medians. Run: ``python benchmarks/objectives.py [--pairs N] [--rounds R]``.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
DIM = 384
Step = Callable[[], Tensor]


def small(name: str, peer: bool, n: int) -> tuple[Step, Tensor]:
    """A loss on ``n`` vectors of ``n / 4`` classes."""
    from polyhead import objectives as o

    torch.manual_seed(0)
    x = torch.randn(n, DIM, requires_grad=True)
    labels = torch.arange(n // 4).repeat(4)
    if peer:
        from pytorch_metric_learning import distances, losses, miners

        loss: Any = {
            "infonce": lambda: losses.NTXentLoss(temperature=0.05),
            "supcon": lambda: losses.SupConLoss(temperature=0.05),
            "multi-similarity": losses.MultiSimilarityLoss,
            "contrastive": lambda: losses.ContrastiveLoss(0.9, 0.3, distance=distances.CosineSimilarity()),
            "triplet, all": lambda: losses.TripletMarginLoss(0.2),
            "triplet, semi-hard": lambda: losses.TripletMarginLoss(0.2),
            "snr contrastive": lambda: losses.ContrastiveLoss(0.1, 1.5, distance=distances.SNRDistance()),
            "proxy-anchor": lambda: losses.ProxyAnchorLoss(n // 4, DIM),
        }[name]()
        if name == "triplet, semi-hard":
            miner = miners.TripletMarginMiner(margin=0.2, type_of_triplets="semihard")
            return lambda: loss(x, labels, miner(x, labels)), x
        return lambda: loss(x, labels), x
    euclid = o.EuclideanSimilarity(normalize=True)
    objective: Any = {
        "infonce": lambda: o.Objective(o.InfoNCE()),
        "supcon": lambda: o.Objective(o.InfoNCE(positives="together")),
        "multi-similarity": lambda: o.Objective(o.MultiSimilarityLoss()),
        "contrastive": lambda: o.Objective(o.ContrastiveLoss(pos_margin=0.9, neg_margin=0.3)),
        "triplet, all": lambda: o.Objective(o.TripletLoss(reduction="nonzero"), euclid),
        "triplet, semi-hard": lambda: o.Objective(
            o.TripletLoss(reduction="nonzero"), euclid, [o.TripletMiner("semihard", one=False)]
        ),
        "snr contrastive": lambda: o.Objective(o.ContrastiveLoss(pos_margin=-0.1, neg_margin=-1.5), o.SNRSimilarity()),
        "proxy-anchor": lambda: o.ProxyObjective(o.ProxyAnchorLoss(), n // 4, DIM),
    }[name]()
    return lambda: objective(x, labels), x


def pairs(kind: str, n: int) -> tuple[Step, Tensor]:
    """``n`` pairs with all others as negatives, both ways round."""
    from polyhead import objectives as o

    torch.manual_seed(0)
    x, y = torch.randn(n, DIM, requires_grad=True), torch.randn(n, DIM, requires_grad=True)
    if kind == "blocks":
        blocks = o.LargeBatchInfoNCE(symmetric=True)
        return lambda: blocks(x, y), x
    if kind == "matrix":
        objective = o.Objective(o.Symmetric(o.InfoNCE()))
        return lambda: objective(x, other=y), x
    if kind == "cached step":
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(DIM, 1536), torch.nn.GELU(), torch.nn.Linear(1536, DIM))
        blocks = o.LargeBatchInfoNCE(symmetric=True)
        sides = [x.detach().split(256), y.detach().split(256)]
        return lambda: o.cached_step(model, sides, blocks).requires_grad_(), x
    from pytorch_metric_learning import losses

    loss = losses.SelfSupervisedLoss(losses.NTXentLoss(temperature=0.05), symmetric=False)
    return lambda: loss(x, y), x


def one(case: str, n: int, rounds: int) -> None:
    """Measure one step in this process and print it as JSON."""
    torch.set_num_threads(1)
    kind, _, name = case.partition(":")
    step, x = pairs(name, n) if kind == "pairs" else small(name, kind == "peer", n)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if rounds > 1:
        step().backward()  # warm; the peak of this step counts, its time does not
    spent = []
    for _ in range(rounds):
        x.grad = None
        started = time.perf_counter()
        step().backward()
        spent.append(time.perf_counter() - started)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": statistics.median(spent), "mib": after / 1024, "grown_mib": (after - before) / 1024}))


def measure(case: str, n: int, rounds: int) -> dict[str, float] | None:
    """Run :func:`one` in a process of its own; None where it ended otherwise (out of memory)."""
    command = [sys.executable, __file__, "--case", case, "--n", str(n), "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        print(done.stderr[-300:], file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure everything, write ``results/objectives.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=32_768)
    parser.add_argument("--n", type=int, default=512, help="vectors of the small batches")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", help="measure one case in this process")
    options = parser.parse_args()
    if options.case:
        one(options.case, options.n, options.rounds)
        return
    names = ["infonce", "supcon", "multi-similarity", "contrastive", "triplet, semi-hard", "triplet, all"]
    names += ["snr contrastive", "proxy-anchor"]
    result: dict[str, Any] = {"small": {}, "pairs": {}}
    for name in names:
        row = {side: measure(f"{side}:{name}", options.n, options.rounds) for side in ("ours", "peer")}
        result["small"][name] = row
        print(name, row, flush=True)
    for kind, n in (
        # The peer holds pairs times negatives, n^3 numbers: 2,048 pairs would take 30 GB.
        ("blocks", 512),
        ("matrix", 512),
        ("pytorch-metric-learning", 512),
        ("blocks", 2048),
        ("matrix", 2048),
        ("blocks", options.pairs),
        ("cached step", options.pairs),
    ):
        result["pairs"][f"{kind}, {n}"] = found = measure(f"pairs:{kind}", n, 1)
        print(kind, n, found, flush=True)
    result |= {
        "vectors": f"{options.n} of {DIM}, {options.n // 4} classes of 4",
        "rounds": options.rounds,
        "threads": 1,
        "machine": platform.processor() or platform.machine(),
        "torch": version("torch"),
        "pytorch-metric-learning": version("pytorch-metric-learning"),
    }
    (HERE / "results" / "objectives.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
