"""What the claims about poolings share: frozen states of all-MiniLM-L6-v2, pairs to train on, and small trainings."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from polyhead.claims.base import loaded
from polyhead.data import data_folder, load_sts, load_texts
from polyhead.evaluate.statistics import Interval
from polyhead.objectives import InfoNCE, Objective, Symmetric

__all__ = ["Labelled", "Pairs", "Tokens", "labelled", "sts_pairs", "tokens_of", "train_classes", "train_pairs"]

MODEL = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Tokens:
    """Frozen states of ``n`` texts.

    Attributes:
        states: ``[n, tokens, dim]``, or ``[n, tokens, layers + 1, dim]`` where all layers were asked for.
        mask: ``[n, tokens]``, 1 for tokens; padding stands right.
    """

    states: Tensor
    mask: Tensor

    def __getitem__(self, rows: Any) -> tuple[Tensor, Tensor]:
        mask = self.mask[rows]
        longest = int(mask.sum(1).max())
        return self.states[rows][:, :longest], mask[:, :longest]

    def __len__(self) -> int:
        return len(self.mask)


@lru_cache(maxsize=8)
def tokens_of(texts: tuple[str, ...], max_tokens: int, layers: bool = False) -> Tokens:
    """States of texts, cut after ``max_tokens``, computed once."""
    model = loaded(MODEL)
    made = model.tokenizer(
        list(texts), truncation=True, max_length=max_tokens, padding="max_length", return_tensors="pt"
    )
    order = made["attention_mask"].sum(1).argsort()
    longest = int(made["attention_mask"].sum(1).max())
    width = (len(texts), longest, *([model.layers + 1] if layers else []), model.hidden_size)
    states = torch.zeros(width)
    with torch.inference_mode():
        for rows in order.split(64):
            mask = made["attention_mask"][rows]
            length = int(mask.sum(1).max())
            found = model(
                input_ids=made["input_ids"][rows, :length],
                attention_mask=mask[:, :length],
                output_hidden_states=layers,
            )
            states[rows, :length] = torch.stack(found.hidden_states, 2) if layers else found.last_hidden_state
    return Tokens(states.clone(), made["attention_mask"][:, :longest])


@dataclass(frozen=True)
class Pairs:
    """Sentence pairs as states.

    Attributes:
        first, second: pairs to train on, each the other's positive.
        a, b: pairs judged, and ``gold [n]`` how alike people found them.
    """

    first: Tokens
    second: Tokens
    a: Tokens
    b: Tokens
    gold: np.ndarray
    data: str


@lru_cache(maxsize=2)
def sts_pairs(train: int, test: int, seed: int, layers: bool = False) -> Pairs:
    """Pairs of STS 2012-14 with a score of 4 and more to train on, pairs of STS 2015 to judge.

    Args:
        train, test: how many, drawn.
        seed: of the draw.
        layers: whether states of all layers are wanted.
    """
    like = [
        pair for year in (2012, 2013, 2014) for data in [load_sts(year)]
        for pair, gold in zip(data.pairs, data.gold, strict=True) if gold >= 4 and pair[0] != pair[1]
    ]  # fmt: skip
    drawn = [like[i] for i in np.random.default_rng(seed).permutation(len(like))[:train]]
    judged = load_sts(2015).sample(test, seed)
    first, second, a, b = (
        tokens_of(tuple(pair[i] for pair in pairs), 32, layers) for pairs in (drawn, judged.pairs) for i in (0, 1)
    )
    words = f"trained on {len(drawn)} pairs of sts-2012 to 2014 with scores from 4, judged on {len(judged)} of sts-2015"
    return Pairs(first, second, a, b, judged.gold, words)


def train_pairs(
    model: nn.Module, data: Pairs, *, steps: int, seed: int, lr: float = 1e-3, batch: int = 48
) -> nn.Module:
    """Train ``model(states, mask) -> [n, d]`` with InfoNCE both ways at temperature 0.05, on batches of pairs."""
    objective = Objective(Symmetric(InfoNCE(temperature=0.05)))
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=lr) if weights else None
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps if optimizer is not None else 0):
        rows = torch.randperm(len(data.first), generator=generator)[:batch]
        loss = objective(model(*data.first[rows]).flatten(1), other=model(*data.second[rows]).flatten(1))
        assert optimizer is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def vectors(model: Callable[[Tensor, Tensor], Tensor], tokens: Tokens) -> Tensor:
    """Vectors ``[n, d]`` of length 1."""
    rows = torch.arange(len(tokens)).split(256)
    return functional.normalize(torch.cat([model(*tokens[part]).flatten(1) for part in rows]), dim=1)


def similarity(model: Callable[[Tensor, Tensor], Tensor], data: Pairs) -> np.ndarray:
    """Cosine of each judged pair ``[n]``."""
    return (vectors(model, data.a) * vectors(model, data.b)).sum(1).double().numpy()


def spearman_difference(
    found: Sequence[np.ndarray], other: Sequence[np.ndarray], gold: np.ndarray, seed: int
) -> Interval:
    """Spearman of ``found`` less that of ``other``, means over runs, with an interval over pairs."""
    rows = np.random.default_rng(seed).integers(0, len(gold), (1_000, len(gold)))
    rows[0] = np.arange(len(gold))
    drawn = [np.mean([_rank_correlation(each[rows], gold[rows]) for each in runs], 0) for runs in (found, other)]
    difference = drawn[0] - drawn[1]
    low, high = np.quantile(difference, [0.025, 0.975])
    return Interval(float(difference[0]), float(low), float(high), len(gold))


def spearman(found: Sequence[np.ndarray], gold: np.ndarray) -> float:
    """Spearman with people's scores, mean over runs."""
    return float(np.mean([_rank_correlation(each[None], gold[None]) for each in found]))


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman of each row ``[rows]`` of ``[rows, n]``."""
    from scipy.stats import rankdata

    ranks = [rankdata(each, axis=1) - (each.shape[1] + 1) / 2 for each in (a, b)]
    return (ranks[0] * ranks[1]).sum(1) / np.sqrt((ranks[0] ** 2).sum(1) * (ranks[1] ** 2).sum(1))


@dataclass(frozen=True)
class Labelled:
    """Texts with classes, as states: to train on, and judged."""

    train: Tokens
    train_labels: Tensor
    test: Tokens
    test_labels: Tensor
    name: str


@lru_cache(maxsize=4)
def labelled(name: str, train: int, test: int, seed: int, max_tokens: int = 40, layers: bool = False) -> Labelled:
    """A part of AG News ("ag-news", four topics) or Banking77 ("banking77", intents), drawn.

    Args:
        name: which.
        train, test: how many texts of each part.
        seed: of the draw.
        max_tokens: longer texts are cut.
        layers: whether states of all layers are wanted.
    """
    generator = np.random.default_rng(seed)
    if name == "ag-news":
        texts = load_texts("ag-news")
        with (data_folder("ag-news", {"test.csv": ""}) / "test.csv").open(encoding="utf-8", newline="") as stream:
            labels = [int(row[0]) - 1 for row in csv.reader(stream)]
    else:
        with (data_folder("banking77", {"train.csv": ""}) / "train.csv").open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
        names = sorted({row["category"] for row in rows})[::4]
        rows = [row for row in rows if row["category"] in names]
        texts, labels = [row["text"] for row in rows], [names.index(row["category"]) for row in rows]
    order = generator.permutation(len(texts))[: train + test]
    found = tokens_of(tuple(texts[i] for i in order), max_tokens, layers)
    gold = torch.tensor([labels[i] for i in order])
    parts = [Tokens(found.states[rows], found.mask[rows]) for rows in (slice(0, train), slice(train, None))]
    return Labelled(parts[0], gold[:train], parts[1], gold[train:], f"{name}, {train} texts to train on, {test} judged")


def train_classes(
    pooler: nn.Module, data: Labelled, *, steps: int, seed: int, rate: float = 3e-3, batch: int = 32
) -> np.ndarray:
    """Train a pooler with a linear classifier on its vectors; whether each judged text is right ``[n]``.

    The vectors are standardised by a batch norm, so that poolers of other scales learn at one rate.

    Args:
        pooler: ``pooler(states, mask) -> [n, ...]``.
        data: texts and classes.
        steps: batches.
        seed: of classifier and batches.
        rate: learning rate of the pooler's own weights; the classifier's is 3e-3.
        batch: texts a batch.
    """
    torch.manual_seed(seed)
    classes = int(data.train_labels.max()) + 1
    with torch.no_grad():
        width = pooler(*data.train[torch.arange(2)]).flatten(1).shape[1]
    head = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, classes))
    groups: list[dict[str, Any]] = [{"params": head.parameters()}, {"params": pooler.parameters(), "lr": rate}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(data.train), (batch,), generator=generator)
        loss = functional.cross_entropy(head(pooler(*data.train[rows]).flatten(1)), data.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    with torch.no_grad():
        found = [head(pooler(*data.test[part]).flatten(1)) for part in torch.arange(len(data.test)).split(256)]
    return (torch.cat(found).argmax(1) == data.test_labels).double().numpy()
