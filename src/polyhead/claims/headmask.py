"""HeadMask: training with heads off spreads what matters over the heads and makes a model robust to losing some."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import nn

from polyhead.act import Gate, HeadMask, gini
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.data import data_folder
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.model import HeadedModel

_HOME = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/master/banking_data/"
_FILES = {"train.csv": _HOME + "train.csv", "test.csv": _HOME + "test.csv"}
TRAINED_LAYERS = 2


class _Classifier(nn.Module):
    """The model with a linear layer on its mean-pooled states; only the last layers are trained."""

    def __init__(self, model: HeadedModel, classes: int) -> None:
        super().__init__()
        self.headed, self.body = model, model.module
        self.out = nn.Linear(model.hidden_size, classes)
        first = model.layers - TRAINED_LAYERS
        for name, parameter in self.body.named_parameters():
            parameter.requires_grad_(any(f"layer.{layer}." in name for layer in range(first, model.layers)))

    def forward(self, texts: list[str]) -> torch.Tensor:
        inputs = self.headed.tokenize(texts, truncation=True, max_length=48)
        states = self.headed(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        logits: torch.Tensor = self.out((states * mask).sum(1) / mask.sum(1))
        return logits


def run(scale: Scale, seed: int) -> Evidence:
    """Accuracy on Banking77 with 25% of the trained layers' heads off at random, with and without HeadMask."""
    full = scale == "full"
    train, test = (
        _rows(name, n, seed) for name, n in (("train.csv", 640 if full else 64), ("test.csv", 300 if full else 60))
    )
    results: dict[str, list[dict[str, float]]] = {}
    for policy in ("none", "random", "importance"):
        results[policy] = [_arm(policy, train, test, 3 if full else 1, seed + i) for i in range(2 if full else 1)]
    hits = {policy: np.mean([each.pop("hits") for each in found], axis=0) for policy, found in results.items()}
    mean = {k: {name: float(np.mean([f[name] for f in found])) for name in found[0]} for k, found in results.items()}
    interval = bootstrap_interval(np.asarray(hits["random"]) - np.asarray(hits["none"]), seed=seed)
    return Evidence(
        measured={
            "difference": interval.value,
            **{f"{name}, {k}": value for k in ("random", "importance") for name, value in mean[k].items()},
        },
        baseline={f"{name}, none": value for name, value in mean["none"].items()},
        expected="with a quarter of the heads off, accuracy after training with random HeadMask above that without",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high),
        decides="difference",
        data=f"Banking77: {len(train)} to train, {len(test)} to test; 5 draws of heads off",
        model="all-MiniLM-L6-v2, last two layers trained",
        notes="Classification in place of translation; few steps. Inequality is the Gini coefficient of |dL/dg|.",
    )


def _rows(name: str, n: int, seed: int) -> list[tuple[str, int]]:
    with (data_folder("banking77", _FILES) / name).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = sorted({row["category"] for row in rows})
    picked = np.random.default_rng(seed).choice(len(rows), n, replace=False)
    return [(rows[i]["text"], names.index(rows[i]["category"])) for i in picked]


def _loss(classifier: _Classifier, texts: list[str], target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(classifier(texts), target)


def _arm(
    policy: str, train: list[tuple[str, int]], test: list[tuple[str, int]], epochs: int, seed: int
) -> dict[str, float]:
    torch.manual_seed(seed)
    model = loaded("all-MiniLM-L6-v2")
    classifier = _Classifier(model, 77)
    mask = None if policy == "none" else HeadMask(3, "random" if policy == "random" else "importance", seed)
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    groups = [{"params": classifier.out.parameters(), "lr": 1e-2}, {"params": trained[:-2], "lr": 2e-4}]
    optimizer = torch.optim.AdamW(groups)
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(len(train))
        for first in range(0, len(order), 16):
            texts, labels = zip(*(train[i] for i in order[first : first + 16]), strict=True)
            target = torch.tensor(labels)

            loss = partial(_loss, classifier, list(texts), target)
            if mask is not None and mask.policy == "importance":
                mask.look(model, loss)
            with nullcontext() if mask is None else mask.on(model):
                value = loss()
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    return _judge(classifier, test, seed)


def _judge(classifier: _Classifier, test: list[tuple[str, int]], seed: int) -> dict[str, float]:
    model, texts = classifier.headed, [text for text, _ in test]
    target = torch.tensor([label for _, label in test])
    with torch.no_grad():
        accuracy = float((classifier(texts).argmax(1) == target).double().mean())
    hits = np.zeros(len(test))
    generator = np.random.default_rng(seed)
    layers = range(model.layers - TRAINED_LAYERS, model.layers)
    heads = [(layer, head) for layer in layers for head in range(model.heads)]
    for _ in range(5):
        off = [heads[i] for i in generator.choice(len(heads), len(heads) // 4, replace=False)]
        with Gate.off(off, model).on(model), torch.no_grad():
            hits += (classifier(texts).argmax(1) == target).double().numpy() / 5
    found = HeadMask(1, "importance").look(model, partial(_loss, classifier, texts[:64], target[:64]))
    unequal = gini(found.values[model.layers - TRAINED_LAYERS :])
    result: dict[str, float] = {"accuracy": accuracy, "with heads off": float(hits.mean()), "gini": unequal}
    return {**result, "hits": hits}  # type: ignore[dict-item]
