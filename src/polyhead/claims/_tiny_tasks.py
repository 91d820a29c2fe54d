"""Tiny Transformers over attention layers, and tasks that they learn in seconds: recall, rows of digits, letters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F

from polyhead.attention import Attention
from polyhead.data import load_texts
from polyhead.evaluate.statistics import Interval

__all__ = [
    "Batch",
    "TinyTransformer",
    "accuracy_and_bits",
    "character_batches",
    "character_scores",
    "digits_rows",
    "news_characters",
    "recall_accuracies",
    "recall_batch",
    "seed_interval",
    "train",
    "trained_accuracy",
]


@dataclass
class Batch:
    """Inputs ``[batch, tokens, features]`` and labels ``[batch, tokens]``, -1 where nothing is asked."""

    inputs: torch.Tensor
    labels: torch.Tensor


class TinyTransformer(nn.Module):
    """Pre-norm blocks around attention layers: ``[batch, tokens, features]`` -> ``[batch, tokens, classes]``.

    ``places`` above 0 adds a learned vector for each of so many places, from a standard deviation of ``spread``.
    """

    def __init__(
        self, layers: Sequence[Attention], features: int, classes: int, places: int = 0, spread: float = 0.02
    ) -> None:
        super().__init__()
        dim = layers[0].dim
        self.places = nn.Parameter(spread * torch.randn(places, dim)) if places else None
        self.enter = nn.Linear(features, dim)
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2 * len(layers)))
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in layers
        )
        self.leave = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, classes))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Logits of each token."""
        states = self.enter(inputs)
        if self.places is not None:
            states = states + self.places[: inputs.shape[1]]
        for at, (layer, mixer) in enumerate(zip(self.layers, self.mixers, strict=True)):
            states = states + layer(self.norms[2 * at](states))
            states = states + mixer(self.norms[2 * at + 1](states))
        logits: torch.Tensor = self.leave(states)
        return logits


def train(
    model: nn.Module,
    batch: Callable[[torch.Generator], Batch],
    steps: int,
    seed: int,
    rate: float = 3e-3,
    balance: float = 0.0,
    around: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Run ``steps`` steps of AdamW with a rate that falls to 0.

    ``balance`` weighs the layers' ``balance_loss``; a step of that number runs within ``around(step)``.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        drawn = batch(generator)
        optimizer.zero_grad()
        with around(step):
            loss = F.cross_entropy(model(drawn.inputs).flatten(0, 1), drawn.labels.flatten(), ignore_index=-1)
            if balance:
                extra = [layer.balance_loss for layer in model.modules() if isinstance(layer, Attention)]
                loss = loss + balance * sum(each for each in extra if each is not None)
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy_and_bits(model: nn.Module, test: Batch) -> tuple[float, float]:
    """Share of right labels, and mean bits that a label costs."""
    logits, asked = model(test.inputs), test.labels >= 0
    right = (logits.argmax(-1) == test.labels)[asked].float().mean().item()
    return right, F.cross_entropy(logits[asked], test.labels[asked]).item() / float(np.log(2))


def trained_accuracy(
    model: nn.Module, batch: Callable[[torch.Generator], Batch], test: Batch, steps: int, seed: int, rate: float = 3e-3
) -> float:
    """Share of right labels of ``test`` after :func:`train`."""
    train(model, batch, steps, seed, rate)
    return accuracy_and_bits(model, test)[0]


def recall_batch(generator: torch.Generator, count: int, pairs: int, names: int = 64, values: int = 16) -> Batch:
    """Associative recall: ``pairs`` tokens of a name and a value each, then the names again; which value was it?

    Features are one-hot: ``names + values``. Names of a text differ.
    """
    keys = torch.rand(count, names, generator=generator).argsort(1)[:, :pairs]
    held = torch.randint(values, (count, pairs), generator=generator)
    order = torch.rand(count, pairs, generator=generator).argsort(1)
    said = F.one_hot(keys, names), F.one_hot(held, values)
    asked = F.one_hot(keys.gather(1, order), names), torch.zeros_like(said[1])
    inputs = torch.cat([torch.cat(said, 2), torch.cat(asked, 2)], 1).float()
    return Batch(inputs, torch.cat([torch.full_like(held, -1), held.gather(1, order)], 1))


def recall_accuracies(
    makers: Mapping[str, Callable[[], Sequence[Attention]]],
    seeds: Sequence[int],
    pairs: int,
    steps: int,
    rate: float = 5e-3,
) -> dict[str, list[float]]:
    """Accuracy of associative recall by kind of layers, one a seed; a seed has the same texts for all kinds."""
    found: dict[str, list[float]] = {name: [] for name in makers}
    for seed in seeds:
        test = recall_batch(torch.Generator().manual_seed(10_000 + seed), 256, pairs)
        for name, make in makers.items():
            torch.manual_seed(seed)
            model = TinyTransformer(make(), 80, 16)
            found[name].append(
                trained_accuracy(model, lambda generator: recall_batch(generator, 32, pairs), test, steps, seed, rate)
            )
    return found


def digits_rows(seed: int) -> tuple[Callable[[torch.Generator], Batch], Batch]:
    """The 1,797 digits of scikit-learn read row by row, labelled at the last row: batches of 64 to train on, a test."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = load_digits()
    inputs = torch.from_numpy(digits.images).float() / 16
    labels = torch.full((len(inputs), 8), -1)
    labels[:, -1] = torch.from_numpy(digits.target)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs)))
    held, rest = order[:500], order[500:]

    def batch(generator: torch.Generator) -> Batch:
        rows = rest[torch.randint(len(rest), (64,), generator=generator)]
        return Batch(inputs[rows], labels[rows])

    return batch, Batch(inputs[held], labels[held])


@lru_cache(maxsize=1)
def news_characters() -> torch.Tensor:
    """AG News as numbers of characters, 0 to 39: small letters, digits, the commonest signs; 39 for all others."""
    text = "\n".join(load_texts("ag-news", 3000)).lower()
    known = "abcdefghijklmnopqrstuvwxyz0123456789 .\n"
    codes = np.full(256, len(known), np.int64)
    codes[np.frombuffer(known.encode(), np.uint8)] = np.arange(len(known))
    return torch.from_numpy(codes[np.frombuffer(text.encode("ascii", "replace"), np.uint8)])


def character_batches(count: int, length: int, held: int = 32) -> tuple[Callable[[torch.Generator], Batch], Batch]:
    """Which character of AG News comes next? Batches to train on, and ``held`` stretches of its last tenth."""
    codes = news_characters()
    edge = len(codes) * 9 // 10

    def cut(starts: torch.Tensor) -> Batch:
        rows = codes[starts[:, None] + torch.arange(length + 1)]
        return Batch(F.one_hot(rows[:, :-1], 40).float(), rows[:, 1:])

    def batch(generator: torch.Generator) -> Batch:
        return cut(torch.randint(edge - length - 1, (count,), generator=generator))

    return batch, cut(torch.linspace(edge, len(codes) - length - 1, held).long())


def character_scores(
    makers: Mapping[str, Callable[[], nn.Module]],
    seeds: Sequence[int],
    steps: int,
    *,
    lengths: Sequence[int] = (48,),
    rate: float = 1e-2,
    balance: float = 0.0,
) -> dict[str, np.ndarray]:
    """Accuracy and bits a character, ``[seeds, lengths, 2]`` by kind of model; a seed has the same texts for all kinds.

    Models (of 40 features and 40 classes) are trained on the first length and tested on all.
    """
    batch, first = character_batches(12, lengths[0])
    tests = [first] + [character_batches(12, length)[1] for length in lengths[1:]]
    found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in makers}
    for seed in seeds:
        for name, make in makers.items():
            torch.manual_seed(seed)
            model = make()
            train(model, batch, steps, seed, rate, balance)
            found[name].append([accuracy_and_bits(model, test) for test in tests])
    return {name: np.array(rows) for name, rows in found.items()}


def seed_interval(values: Sequence[float]) -> Interval:
    """Mean over seeds with its 95% interval of Student's t."""
    wide = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    mean = float(np.mean(values))
    return Interval(mean, mean - float(wide), mean + float(wide), len(values))
