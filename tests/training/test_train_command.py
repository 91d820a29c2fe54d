"""`polyhead train`: what it is told, what it leaves and says."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_parts import pairs, tiny_encoder
from typer.testing import CliRunner

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.training import OBJECTIVES, objective_for, trainable


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pairs under other names, and a map of heads."""
    where = tmp_path_factory.mktemp("train")
    tiny_encoder().save_pretrained(str(where / "model"), create_model_card=False)
    with (where / "pairs.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "query", "reply"])
        writer.writerows([i, row["anchor"], row["positive"]] for i, row in enumerate(pairs(8)))
    values = np.zeros((3, 4))
    values[1, 2] = 1.0
    HeadMap(values, "made up", "tiny", "none").save(where / "map.json")
    return where


def run(folder: Path, *arguments: str) -> Any:
    from polyhead.cli.app import app

    given = ["train", str(folder / "model"), str(folder / "pairs.csv"), "--batch-size", "8", "--device", "cpu"]
    columns = ["--column", "anchor=query", "--column", "positive=reply"]
    result = CliRunner().invoke(app, [*given, *columns, *arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_heads_of_a_map_are_trained_and_the_run_is_told(folder: Path) -> None:
    data = str(folder / "pairs.csv")
    arguments = ["--out", str(folder / "out"), "--heads", str(folder / "map.json"), "--top", "1", "--steps", "2"]
    arguments += ["--learning-rate", "1e-2", "--matryoshka", "8,32", "--depth", "--head-dropout", "1", "--eval", data]
    found = json.loads(run(folder, *arguments, "--json"))
    assert (found["rows"], found["kind"], found["steps"]) == (8, "pairs", 2)
    assert found["before"].keys() == found["after"].keys() == {"accuracy@1", "mrr"}
    start, tuned = (trainable(folder / name).state_dict() for name in ("model", "out"))
    moved = {name for name in start if not torch.equal(start[name], tuned[name])}
    assert moved
    assert all(".layer.1.attention." in name for name in moved)
    assert "held out" in run(folder, *arguments, "--resume")
    with pytest.raises(InputError, match="finished run"):
        run(folder, *arguments)


def test_what_does_not_go_together_is_said(folder: Path) -> None:
    out = ["--out", str(folder / "none")]
    for arguments, said in (
        (["--depth"], "goes with --matryoshka"),
        (["--offsets"], "goes with --heads"),
        (["--matryoshka", "a,b"], "expected widths"),
        (["--column", "anchor"], "expected ROLE=COLUMN"),
        (["--objective", "softmax"], "No objective 'softmax'"),
        (["--objective", "cosent", "--cached", "2", "--matryoshka", "8", "--depth"], "runs the model itself"),
    ):
        with pytest.raises(InputError, match=said):
            run(folder, *out, *arguments)


def test_every_objective_has_a_name_and_learns() -> None:
    torch.manual_seed(0)
    for name in OBJECTIVES:
        vectors, other = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
        kind = "scored" if name in ("cosent", "angle") else "pairs"
        objective = objective_for(name, kind)
        if name == "large-batch-infonce":
            value = objective(vectors, other)
        else:
            value = objective(vectors, torch.rand(6) if kind == "scored" else None, other)
        value.backward()
        assert vectors.grad is not None
        assert vectors.grad.abs().sum() > 0, name
    assert {type(objective_for("auto", kind).loss).__name__ for kind in ("pairs", "labelled", "scored")} == {
        "InfoNCE", "MultiSimilarityLoss", "CoSENTLoss"
    }  # fmt: skip
    with pytest.raises(InputError, match="Texts alone"):
        objective_for("auto", "texts")
