"""One report for all transforms: plain values, and in words only what changed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny import inputs_for, tiny

import polyhead
from polyhead.compress import (
    Cost,
    Int8Quantizer,
    Report,
    compress_vectors,
    convert_to_gqa,
    gqa_to_mla,
    hash_tokens,
    prune,
    to_mla,
)
from polyhead.heads.tasks import Batch, Task


class Mean(Task):
    """Mean output of two texts, as good as it is large."""

    name, metric = "mean", "mean output"

    def batches(self, model: polyhead.HeadedModel) -> list[Batch]:
        return [Batch(inputs_for("llama"), {}, 2)]

    def predict(self, outputs: object, batch: Batch) -> torch.Tensor:
        return outputs.last_hidden_state.square().mean((1, 2))

    def loss(self, predictions: torch.Tensor, batch: Batch) -> torch.Tensor:
        return -predictions

    def quality(self, predictions: np.ndarray, rows: np.ndarray) -> float:
        return float(predictions[rows].mean())


def test_every_transform_gives_one_kind_of_report() -> None:
    model, task = polyhead.load(tiny("llama")), Mean()
    made = {
        "prune": prune(model, [(0, 2), (0, 3)], task=task),
        "gqa": convert_to_gqa(model, 1, task=task),
        "mla": to_mla(model, 8, 1, task=task),
        "transmla": gqa_to_mla(model, task=task),
        "hash": hash_tokens(model, 40, task=task),
    }
    with torch.no_grad():
        for name, (smaller, report) in made.items():
            outputs = [each(**inputs_for("llama")).last_hidden_state for each in (model, smaller)]
            expected = tuple(float(each.square().mean((1, 2)).mean()) for each in outputs)
            assert type(report) is Report
            assert report.quality == pytest.approx(expected, rel=1e-6)
            assert report.metric == "mean output"
            assert json.loads(json.dumps(report.to_json()))["before"]["parameters"] == report.before.parameters
            assert (report.change < 1e-5) == (name == "transmla")
            counted = sum(parameter.numel() for parameter in smaller.module.parameters())
            assert report.after.parameters == counted
    vectors = np.random.default_rng(0).normal(size=(50, 8))
    assert type(compress_vectors(vectors, Int8Quantizer(), vectors)[1]) is Report


def test_in_words_it_says_what_changed() -> None:
    report = Report(Cost(1000, bytes_per_vector=4), Cost(800, bytes_per_vector=4), quality=(0.9, 0.8), metric="recall")
    assert str(report) == "parameters: 1,000 -> 800\nrecall: 0.9000 -> 0.8000"
    full = Report(Cost(), Cost(), parity=2e-7, quality=(1.0, 0.5), metric="recall", interval=(0.4, 0.6), change=0.25)
    lines = ["parity: 2.0e-07", "change of the output: 0.250", "recall: 1.0000 -> 0.5000 (0.4000 to 0.6000)"]
    assert str(full).splitlines() == lines
