"""ACT: taking attention from sinks after the first token helps a model choose the right label."""

from __future__ import annotations

import csv

import numpy as np
import torch

from polyhead.act import AttentionCalibration, calibration_gain
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.data import data_folder
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.heads.tasks import Batch, FunctionTask, run_task
from polyhead.model import HeadedModel

_AG_NEWS = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/test.csv"
_LABELS = (" World", " Sports", " Business", " Technology")


def run(scale: Scale, seed: int) -> Evidence:
    """Log-probability of the right topic among four on Gemma: plain, calibrated in chosen layers, in random layers.

    Smoke has 4 items cut at 120 characters to choose layers by, and 8 to test, full 40 and 80 of 200 characters.
    """
    model = loaded("gemma-3-270m", lm_head=True)
    full = scale == "full"
    rows, length = _rows(120 if full else 12, seed), 200 if full else 120
    held_out, test = (rows[: len(rows) // 3], rows[len(rows) // 3 :])
    gain = calibration_gain(model, _task(model, held_out, length), by="layer")
    treated = [(int(layer), int(head)) for layer, head in np.argwhere(gain.values >= 0)]
    candidates = range(2, model.layers - 1)
    count = len({layer for layer, _ in treated})
    drawn = np.random.default_rng(seed).choice(list(candidates), count, replace=False)
    task = _task(model, test, length)
    plain = run_task(task, model)
    found = {}
    for name, heads in (
        ("chosen layers", treated),
        ("random layers", [(int(layer), head) for layer in drawn for head in range(model.heads)]),
    ):
        with AttentionCalibration(heads=heads).on(model):
            found[name] = run_task(task, model)
    interval = bootstrap_interval(found["chosen layers"] - plain, seed=seed)
    return Evidence(
        measured={
            "difference": interval.value,
            "log-probability, chosen layers": float(found["chosen layers"].mean()),
        },
        baseline={
            "log-probability, plain": float(plain.mean()),
            "log-probability, random layers": float(found["random layers"].mean()),
        },
        expected="log-probability of the right label higher with calibration in the chosen layers than without",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high),
        decides="difference",
        data=f"AG News: {len(held_out)} items to choose layers, {len(test)} to test",
        model=model.name,
        notes="Layers, not single heads, are chosen, for time; beta 0.4, threshold 5 even shares; few items at smoke.",
        details={"layers treated": sorted({layer for layer, _ in treated})},
    )


def _rows(n: int, seed: int) -> list[tuple[str, int]]:
    file = data_folder("ag-news", {"test.csv": _AG_NEWS}) / "test.csv"
    with file.open(encoding="utf-8", newline="") as stream:
        rows = [(f"{title}. {text}", int(label) - 1) for label, title, text in csv.reader(stream)]
    return [rows[i] for i in np.random.default_rng(seed).choice(len(rows), n, replace=False)]


def _task(model: HeadedModel, rows: list[tuple[str, int]], length: int) -> FunctionTask:
    """Log-probability of the right one of the four label words, after each item."""
    words = [model.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in _LABELS]
    batches = []
    for first in range(0, len(rows), 8):
        part = rows[first : first + 8]
        inputs = model.tokenize([f"News: {text[:length]}\nTopic:" for text, _ in part])
        right = torch.tensor([label for _, label in part], device=model.device)
        batches.append(Batch({**inputs, "logits_to_keep": torch.tensor([-1])}, {"right": right}, len(part)))

    def predict(outputs: object, batch: Batch) -> torch.Tensor:
        logits: torch.Tensor = outputs.logits[:, -1, words].float()  # type: ignore[attr-defined]
        return torch.log_softmax(logits, -1).gather(1, batch.targets["right"][:, None])[:, 0]

    return FunctionTask(batches, predict, "AG News topics", "log-probability")
