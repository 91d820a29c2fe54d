"""Where labels change sharply between look-alikes, networks err more and are easier to attack."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.errors import InputError
from polyhead.evaluate.intrinsic import intrinsic_dimension, label_sharpness
from polyhead.evaluate.statistics import Interval, bootstrap_interval, bootstrap_of
from polyhead.evaluate.sts import spearman

JUDGED = 50


@dataclass
class _Task:
    """A two-class task: vectors to learn from and to be judged by, labels 0 and 1."""

    pool: np.ndarray
    pool_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def run(scale: Scale, seed: int) -> Evidence:
    """Spearman's correlation of label sharpness with the test error of a small network, over two-class tasks.

    All 45 pairs of scikit-learn's digits (full adds 20 pairs of Banking77 intents as all-MiniLM-L6-v2 vectors,
    correlated apart). Sharpness and dimension are of the texts or pictures that may be learnt from; the
    error is the mean over 20 and 50 examples learnt from and several draws. Decides: that correlation, its interval by
    resampling tasks. Besides: the accuracy lost to a step of the gradient's sign, and whether the hidden layer's
    dimension stays below the data's.
    """
    smoke = scale == "smoke"
    torch.set_num_threads(1)  # the networks are tiny
    sets = {"digits": _digits(seed)} if smoke else {"digits": _digits(seed), "banking77": _intents(20, seed)}
    measured: dict[str, float] = {}
    baseline: dict[str, float] = {}
    details: dict[str, dict[str, Any]] = {}
    draws: list[Interval] = []
    for name, tasks in sets.items():
        found = _measured(tasks, 3 if smoke else 10, seed)
        pairs = (("sharpness", "error"), ("sharpness", "accuracy lost"), ("dimension", "error"))
        rho = {f"rho of {a} with {b}, {name}": _rho(found[a], found[b], seed) for a, b in pairs}
        measured |= {key: interval.value for key, interval in rho.items()}
        draws.append(rho[f"rho of sharpness with error, {name}"])
        below = bootstrap_interval(found["dimension"] - found["hidden dimension"], seed=seed)
        measured[f"dimension less that of the hidden layer, {name}"] = below.value
        baseline[f"mean error, {name}"] = float(found["error"].mean())
        details[name] = {key: values.tolist() for key, values in found.items()}
        details[name]["intervals"] = {key: [one.low, one.high] for key, one in rho.items()}
        details[name]["dimension less hidden, 95%"] = [below.low, below.high]
    decides = "rho of sharpness with error, digits"
    return Evidence(
        measured=measured,
        baseline=baseline,
        expected="the sharper the labels, the larger the test error over tasks (correlation above 0) and the more "
        "accuracy an attack takes; the hidden layer's dimension does not exceed the data's",
        interval=(draws[0].low, draws[0].high),
        verdict=verdict_of(draws[0].low, draws[0].high),
        decides=decides,
        data=", ".join(f"{name}, {len(tasks)} two-class tasks" for name, tasks in sets.items()),
        model="a hidden layer of 32",
        notes="The paper compares whole image sets of two kinds; here two-class tasks of one kind, whose sharpness "
        "differs less. Sharpness is an extreme value, so it moves with the pairs drawn.",
        details=details,
    )


def _rho(x: np.ndarray, y: np.ndarray, seed: int) -> Interval:
    return bootstrap_of(lambda rows: spearman(x[rows], y[rows]), len(x), seed=seed)


def _digits(seed: int) -> list[_Task]:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = load_digits()
    x, y = digits.data / 16.0, digits.target
    return [_task(x[y == a], x[y == b], seed) for a, b in combinations(range(10), 2)]


def _intents(count: int, seed: int) -> list[_Task]:
    from polyhead.embed import Encoder
    from polyhead.evaluate.task_data import load_labelled

    data = load_labelled("banking77")
    generator = np.random.default_rng(seed)
    names = sorted(set(data.test_labels))
    large = [name for name in names if data.train_labels.count(name) >= 100]
    chosen = [generator.choice(len(large), 2, replace=False) for _ in range(count)]
    encoder, known = Encoder(), {}
    for name in {large[i] for pair in chosen for i in pair}:
        texts = [text for text, label in zip(data.train, data.train_labels, strict=True) if label == name]
        known[name] = encoder.encode(texts).dense.astype(np.float64)
    return [_task(known[large[a]], known[large[b]], seed) for a, b in chosen]


def _task(first: np.ndarray, second: np.ndarray, seed: int) -> _Task:
    """Two thirds to learn from; of the rest as many of each as every task has."""
    generator = np.random.default_rng(seed)
    sides = [side[generator.permutation(len(side))] for side in (first, second)]
    cut = [len(side) * 2 // 3 for side in sides]
    if min(len(side) - at for side, at in zip(sides, cut, strict=True)) < JUDGED // 2:
        raise InputError(f"A task needs {JUDGED // 2} examples of each label to be judged by.")
    pool = [side[:at] for side, at in zip(sides, cut, strict=True)]
    test = [side[at : at + JUDGED // 2] for side, at in zip(sides, cut, strict=True)]
    labels = [np.repeat([0, 1], [len(a), len(b)]) for a, b in (pool, test)]
    return _Task(np.concatenate(pool), labels[0], np.concatenate(test), labels[1])


def _measured(tasks: list[_Task], draws: int, seed: int) -> dict[str, np.ndarray]:
    """Sharpness, dimension, error, accuracy lost to an attack and dimension of the hidden layer, ``[tasks]`` each."""
    found: dict[str, list[float]] = {"sharpness": [], "dimension": []}
    for task in tasks:
        found["sharpness"].append(label_sharpness(task.pool, task.pool_labels, seed=seed))
        found["dimension"].append(intrinsic_dimension(task.pool, k=20))
    error, lost, hidden = [], [], []
    for size in (20, 50):
        one, two, three = _trained(tasks, size, draws, seed)
        error.append(one)
        lost.append(two)
        hidden.append(three)
    rest = {"error": error, "accuracy lost": lost, "hidden dimension": hidden}
    return {name: np.array(values) for name, values in found.items()} | {
        name: np.mean(values, axis=0) for name, values in rest.items()
    }


def _trained(tasks: list[_Task], size: int, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All networks at once: one for each task and draw, 100 steps of Adam on ``size`` examples."""
    generator = torch.Generator().manual_seed(seed + size)
    rows = [[_balanced(task.pool_labels, size, generator) for _ in range(draws)] for task in tasks]
    x = torch.tensor(
        np.array([[task.pool[row] for row in some] for task, some in zip(tasks, rows, strict=True)])
    ).float()
    y = torch.tensor(
        np.array([[task.pool_labels[row] for row in some] for task, some in zip(tasks, rows, strict=True)])
    )
    x, y = x.flatten(0, 1), y.flatten(0, 1)  # [networks, size, dim]
    width = x.shape[2]
    weights = [
        torch.randn(len(x), width, 32, generator=generator) / width**0.5,
        torch.zeros(len(x), 1, 32),
        torch.randn(len(x), 32, 2, generator=generator) / 32**0.5,
    ]
    for weight in weights:
        weight.requires_grad_()

    def inner(inputs: torch.Tensor) -> torch.Tensor:
        return torch.relu(inputs @ weights[0] + weights[1])

    optimizer = torch.optim.Adam(weights, lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        # A sum over networks: each gets the gradient of its own mean loss.
        cross_entropy((inner(x) @ weights[2]).flatten(0, 1), y.flatten(), reduction="sum").div(size).backward()
        optimizer.step()
    test = torch.tensor(np.array([task.test for task in tasks])).float().repeat_interleave(draws, 0).requires_grad_()
    gold = torch.tensor(np.array([task.test_labels for task in tasks])).repeat_interleave(draws, 0)
    logits = inner(test) @ weights[2]
    (slope,) = torch.autograd.grad(cross_entropy(logits.flatten(0, 1), gold.flatten(), reduction="sum"), test)
    spread = test.detach().std(dim=(1, 2), keepdim=True)
    with torch.no_grad():
        right = (logits.argmax(-1) == gold).float().mean(1)
        attacked = ((inner(test + 0.2 * spread * slope.sign()) @ weights[2]).argmax(-1) == gold).float().mean(1)
        states = [inner(torch.tensor(task.pool).float())[at * draws].numpy() for at, task in enumerate(tasks)]
    error, lost = (1 - right).reshape(len(tasks), draws), (right - attacked).reshape(len(tasks), draws)
    hidden = np.array([intrinsic_dimension(state, k=20) for state in states])
    return error.mean(1).numpy().astype(np.float64), lost.mean(1).numpy().astype(np.float64), hidden


def _balanced(labels: np.ndarray, size: int, generator: torch.Generator) -> np.ndarray:
    """Rows of ``size / 2`` examples of each label."""
    sides = [np.flatnonzero(labels == label) for label in (0, 1)]
    return np.concatenate([side[torch.randperm(len(side), generator=generator)[: size // 2].numpy()] for side in sides])
