"""A run killed at any moment and resumed ends at the same weights as one that was let run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_parts import pairs, run_options

from polyhead.errors import InputError
from polyhead.objectives import InfoNCE, ProxyAnchorLoss, ProxyObjective
from polyhead.training import HeadDropout, HeadOffsets, Matryoshka, Options, Trainer, trainable


def same(first: Any, second: Any) -> bool:
    """Whether two models have the same weights, bit for bit."""
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_killed_run_ends_at_the_same_weights(encoder_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder_folder, tmp_path / "model")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        str(Path(__file__).with_name("training_parts.py")),
        str(tmp_path),
        str(torch.get_num_threads()),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "step 7":  # after the checkpoint at 6, in the middle of the second epoch of four steps
                process.send_signal(signal.SIGKILL)
                break
        process.wait(timeout=60)
    assert process.returncode == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "killed" / "checkpoints").iterdir())
    assert left == ["checkpoint-3", "checkpoint-6"]
    assert not json.loads((tmp_path / "killed" / "training.json").read_text())["finished"]

    def run(name: str, resume: bool) -> Trainer:
        objective = Matryoshka(InfoNCE(), (8, 32))
        trainer = Trainer(objective, tmp_path / name, run_options(), during=[HeadDropout(1)])
        return trainer.fit(str(tmp_path / "model"), pairs(16), resume=resume)

    with pytest.raises(InputError, match="can be resumed"):
        run("killed", resume=False)
    whole, resumed = run("whole", resume=False), run("killed", resume=True)
    assert whole.steps_ == resumed.steps_ == 8
    assert same(whole.model_, resumed.model_)
    assert not same(whole.model_, trainable(encoder_folder))
    # The folder on disk is the same model, and a finished run is not done again.
    again = Trainer(Matryoshka(InfoNCE(), (8, 32)), tmp_path / "killed", run_options(), during=[HeadDropout(1)])
    assert same(again.fit(str(tmp_path / "model"), pairs(16), resume=True).model_, whole.model_)


def stop_after(step: int) -> Any:
    def progress(done: int, total: int | None) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


def test_weights_of_the_objective_and_offsets_of_heads_are_resumed_too(encoder_folder: Path, tmp_path: Path) -> None:
    data = [{"text": row["anchor"], "label": number % 4} for number, row in enumerate(pairs(16))]
    options = Options(batch_size=4, epochs=2, learning_rate=1e-2, save_every=2, device="cpu")

    def objective() -> ProxyObjective:
        torch.manual_seed(3)
        return ProxyObjective(ProxyAnchorLoss(), 4, 32)

    first, second, tune = objective(), objective(), HeadOffsets([(1, 2)])
    whole = Trainer(first, options=options, tune=tune).fit(encoder_folder, data)
    with pytest.raises(KeyboardInterrupt):
        Trainer(objective(), tmp_path / "run", options, tune=tune).fit(encoder_folder, data, progress=stop_after(5))
    # What a process killed while writing would leave behind is not taken for a checkpoint.
    torn = tmp_path / "run" / "checkpoints" / "checkpoint-5"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half of it")
    resumed = Trainer(second, tmp_path / "run", options, tune=tune).fit(encoder_folder, data, resume=True)
    assert same(whole.model_, resumed.model_)
    assert not same(whole.model_, trainable(encoder_folder))
    assert torch.equal(first.proxies, second.proxies)
    assert not torch.equal(first.proxies, objective().proxies)


def test_a_run_is_not_resumed_with_other_settings(encoder_folder: Path, tmp_path: Path) -> None:
    options = Options(batch_size=4, steps=3, save_every=1, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        Trainer(InfoNCE(), tmp_path / "run", options).fit(encoder_folder, pairs(8), progress=stop_after(2))
    for objective, data, what in ((InfoNCE(temperature=1.0), pairs(8), "objective"), (InfoNCE(), pairs(9), "data")):
        with pytest.raises(InputError, match=f"{what} was"):
            Trainer(objective, tmp_path / "run", options).fit(encoder_folder, data, resume=True)
    with pytest.raises(InputError, match="in use"):
        Trainer(InfoNCE(), encoder_folder, options).fit(encoder_folder, pairs(8))
