"""ALPS: the heads whose weights moved in one tuning are the ones to tune the next time."""

from __future__ import annotations

import copy
import csv

import numpy as np
import torch
from torch import nn

from polyhead.act.grad_mask import HeadGradMask
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.data import data_folder, load_sts
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.heads.tasks import PairSimilarity, run_task
from polyhead.heads.weight_shift import WeightShift
from polyhead.model import HeadedModel, load

_HOME = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/master/banking_data/"
_FILES = {"train.csv": _HOME + "train.csv", "test.csv": _HOME + "test.csv"}
_CLASSES, _TUNED = 16, 7
Rows = list[tuple[str, int]]
Heads = list[tuple[int, int]]


def run(scale: Scale, seed: int) -> Evidence:
    """all-MiniLM-L6-v2 tuned on half of some Banking77 questions; the 7 of 72 heads that moved most, on the other half.

    Only attention and a linear classifier are trained. Decided by accuracy on test questions with the top 7 heads
    tuned, less that with 7 random ones; the interval is over questions. Smoke tunes for 10 steps and draws once, full
    for 60 and five times.
    """
    base = loaded("all-MiniLM-L6-v2")
    full = scale == "full"
    steps, draws = (60, 5) if full else (10, 1)
    train, test = (_rows(name, seed) for name in _FILES)
    test = test[: 400 if full else 96]
    half = len(train) // 2
    task, _ = _tuned(base, train[:half], None, steps, seed)
    shift = WeightShift().score(base, task)
    top = shift.top(_TUNED)
    generator = np.random.default_rng(seed)
    every = [(layer, head) for layer in range(base.layers) for head in range(base.heads)]
    pairs = PairSimilarity(load_sts(2015).sample(300 if full else 32, seed))
    before = _spearman(pairs, base)

    def arm(heads: Heads | None) -> tuple[np.ndarray, float]:
        model, out = _tuned(base, train[half:], heads, steps, seed)
        return _right(model, out, test), before - _spearman(pairs, model)

    mine, whole = arm(top), arm(None)
    random = [arm([every[i] for i in generator.choice(len(every), _TUNED, replace=False)]) for _ in range(draws)]
    at_random = np.mean([right for right, _ in random], axis=0)
    gap = bootstrap_interval(mine[0] - at_random, seed=seed)
    return Evidence(
        measured={
            "difference": gap.value,
            "accuracy, top 7 heads tuned": float(mine[0].mean()),
            "fall of STS spearman, top 7": mine[1],
        },
        baseline={
            "accuracy, 7 random heads": float(at_random.mean()),
            "accuracy, all heads": float(whole[0].mean()),
            "fall of STS spearman, random": float(np.mean([fall for _, fall in random])),
            "fall of STS spearman, all heads": whole[1],
            "STS spearman before": before,
        },
        expected="top 7 above random 7, with less forgetting than all heads",
        interval=(gap.low, gap.high),
        verdict=verdict_of(gap.low, gap.high),
        decides="difference",
        data=f"Banking77, {_CLASSES} intents: {half} questions for each tuning, {len(test)} to test; {draws} draws",
        model=base.name,
        notes=f"{steps} steps of 16 questions, so little moves. A sentence encoder, not a chat model; CLINC150, "
        "the second set of the plan, is not here.",
        details={"heads": [list(at) for at in top], "shift by layer": shift.values.mean(1).tolist()},
    )


def _rows(name: str, seed: int) -> Rows:
    """Questions of some intents, in random order."""
    with (data_folder("banking77", _FILES) / name).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    names = sorted({row["category"] for row in rows})
    chosen = np.random.default_rng(seed).choice(len(names), _CLASSES, replace=False)
    number = {names[i]: place for place, i in enumerate(chosen)}
    kept = [(row["text"], number[row["category"]]) for row in rows if row["category"] in number]
    return [kept[i] for i in np.random.default_rng(seed + 1).permutation(len(kept))]


def _pooled(model: HeadedModel, texts: list[str]) -> torch.Tensor:
    inputs = model.tokenize(texts, truncation=True, max_length=24)
    mask = inputs["attention_mask"][..., None]
    states: torch.Tensor = model(**inputs).last_hidden_state
    return (states * mask).sum(1) / mask.sum(1)


def _tuned(base: HeadedModel, rows: Rows, heads: Heads | None, steps: int, seed: int) -> tuple[HeadedModel, nn.Linear]:
    """A copy with attention (of some heads; None for all) and a classifier trained, the same start for every arm."""
    torch.manual_seed(seed)
    model = load(copy.deepcopy(base.module))
    model.files, model.name = base.files, base.name
    out = nn.Linear(base.hidden_size, _CLASSES)
    every = [(layer, head) for layer in range(model.layers) for head in range(model.heads)]
    mask = HeadGradMask(every if heads is None else heads)
    model.module.requires_grad_(False)
    trained = [parameter.requires_grad_() for parameter, _ in mask.masks(model)]
    groups = [{"params": out.parameters(), "lr": 1e-2}, {"params": trained, "lr": 5e-4}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    generator = np.random.default_rng(seed)
    with mask.on(model):
        for _ in range(steps):
            some = [rows[i] for i in generator.choice(len(rows), 16, replace=False)]
            logits = out(_pooled(model, [text for text, _ in some]))
            optimiser.zero_grad()
            nn.functional.cross_entropy(logits, torch.tensor([label for _, label in some])).backward()
            optimiser.step()
    return model, out


def _right(model: HeadedModel, out: nn.Linear, rows: Rows) -> np.ndarray:
    found = []
    with torch.inference_mode():
        for first in range(0, len(rows), 32):
            found.append(out(_pooled(model, [text for text, _ in rows[first : first + 32]])).argmax(1))
    return (torch.cat(found) == torch.tensor([label for _, label in rows])).double().numpy()


def _spearman(pairs: PairSimilarity, model: HeadedModel) -> float:
    return pairs.quality(run_task(pairs, model), np.arange(len(pairs.data)))
