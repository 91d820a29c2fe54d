"""What measuring heads costs, beside the obvious way of doing it, on the same machine in the same run.

Figures are ratios of CPU time on one thread, so that a busy machine changes them little; each is the median of some
rounds in which the peers take turns. Run: ``python benchmarks/heads.py [--rounds R] [--only NAME] [--subject NAME]``.

Each function of ``MEASUREMENTS`` takes a :class:`Subject` and the rounds, and returns plain values.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import polyhead
from polyhead.act.gate import Gate
from polyhead.heads.importance import AblationImportance, GradientImportance
from polyhead.heads.patching import AttributionPatching, PatchingData
from polyhead.heads.suffix import every_head, sweep_losses
from polyhead.heads.tasks import Batch, FunctionTask, NextToken, PairSimilarity, Task, task_for
from polyhead.model import HeadedModel

HERE = Path(__file__).parent


@dataclass
class Subject:
    """A model, a task for it, and whether its weights are trained."""

    name: str
    model: HeadedModel
    task: Task
    trained: bool
    plain_heads: int  # how many heads the plain loop is timed on; its time grows linearly


def gpt2_shape() -> Subject:
    """GPT-2-small's shape with random weights, without the language-model head; 4 texts of 32 tokens."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    model = polyhead.load(GPT2Model(GPT2Config()).eval())
    ids = torch.randint(0, 50257, (4, 32))
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {}, 4)
    task = FunctionTask([batch], lambda outputs, batch: outputs.last_hidden_state.pow(2).mean((1, 2)), "random tokens")
    return Subject("gpt2-small shape, 4 x 32 tokens", model, task, False, 24)


def minilm() -> Subject:
    """all-MiniLM-L6-v2 on 48 pairs of STS 2014, batches of 16."""
    model = polyhead.load("all-MiniLM-L6-v2")
    task = task_for(model, "sts-2014", limit=48)
    assert isinstance(task, PairSimilarity)
    task.batch_size = 16
    return Subject("all-MiniLM-L6-v2, 48 STS pairs", model, task, True, 9)


def gemma() -> Subject:
    """Gemma-3-270M with its language-model head on 4 news items of 16 tokens."""
    from polyhead.data import load_texts

    model = polyhead.load("gemma-3-270m", dtype="float32", lm_head=True)
    task = NextToken(load_texts("ag-news", 4), "ag-news", max_tokens=16, batch_size=4)
    return Subject("gemma-3-270m with its head, 4 x 16 tokens", model, task, True, 6)


def cpu_seconds(peers: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each peer over rounds in which they take turns, after one unmeasured call."""
    found: dict[str, list[float]] = {name: [] for name in peers}
    for call in peers.values():
        call()
    for _ in range(rounds):
        for name, call in peers.items():
            begin = time.process_time()
            call()
            found[name].append(time.process_time() - begin)
    return {name: statistics.median(values) for name, values in found.items()}


def forward(subject: Subject) -> None:
    """All the task's batches through the plain model."""
    for batch in subject.task.batches(subject.model):
        with torch.inference_mode():
            subject.model(**batch.inputs)


def recording(subject: Subject, rounds: int) -> dict[str, float]:
    """Recording what every head gives, beside the plain SDPA forward pass. Target: 1.05."""

    def recorded() -> None:
        for batch in subject.task.batches(subject.model):
            with torch.inference_mode(), subject.model.record("heads") as found:
                subject.model(**batch.inputs)
            assert found.layer_heads(0).shape[1] == subject.model.attention_layers[0].heads

    seconds = cpu_seconds({"forward": lambda: forward(subject), "recorded": recorded}, 5 * rounds)
    return {"forward_s": seconds["forward"], "ratio": seconds["recorded"] / seconds["forward"]}


def gradient(subject: Subject, rounds: int) -> dict[str, float]:
    """Gradient importance of all heads, in forward passes over the same batches. Target: 3."""
    peers = {
        "forward": lambda: forward(subject),
        "gradient": lambda: GradientImportance().score(subject.model, subject.task),
    }
    seconds = cpu_seconds(peers, rounds)
    return {"forwards": seconds["gradient"] / seconds["forward"]}


def ablation(subject: Subject, rounds: int) -> dict[str, float]:
    """Exact ablation of all heads beside a loop of forward passes with one head off. Target: 0.35.

    The loop runs the same batches; it is timed on some heads, spread over the layers, and its time scaled to all.
    ``ratio_without_trimming`` leaves the padding in, as the loop does.
    """
    model, task = subject.model, subject.task
    heads = every_head(model)
    some = heads[:: max(1, len(heads) // subject.plain_heads)]
    plain: dict[tuple[int, int], np.ndarray] = {}

    def loop() -> None:
        for head in some:
            with Gate.off([head], model).on(model):
                plain[head] = _losses(model, task)

    started = time.process_time()
    loop()
    loop_seconds = (time.process_time() - started) / len(some) * len(heads)
    result: dict[str, float] = {"loop_s": loop_seconds, "loop_heads_timed": len(some)}
    for name, trim in (("ratio", True), ("ratio_without_trimming", False)):
        started = time.process_time()
        losses = sweep_losses(model, task, lambda layer, heads, z: torch.zeros_like(z), trim=trim)
        result[name] = (time.process_time() - started) / loop_seconds
        differences = [float(np.abs(losses[head] - plain[head]).max()) for head in some]
        result[f"{name}_largest_difference_of_a_loss"] = max(differences)
    return result


def _losses(model: HeadedModel, task: Task) -> np.ndarray:
    found = []
    for batch in task.batches(model):
        with torch.inference_mode():
            found.append(task.loss(task.predict(model(**batch.inputs), batch), batch).double().numpy())
    return np.concatenate(found)


def patching(subject: Subject, rounds: int) -> dict[str, float]:
    """Attribution patching of all heads beside two plain forward passes and one backward. Target: 1, that is no more.

    The corrupt inputs are the clean ones with their tokens in reverse; the metric is the task's own loss, negated.
    """
    model, task = subject.model, subject.task
    batches = task.batches(model)
    corrupt = [
        Batch({**each.inputs, "input_ids": each.inputs["input_ids"].flip(1)}, each.targets, each.examples)
        for each in batches
    ]

    def metric(outputs: Any, batch: Batch) -> torch.Tensor:
        return -task.loss(task.predict(outputs, batch), batch)

    def plain() -> None:
        for source, run in zip(batches, corrupt, strict=True):
            with torch.no_grad():
                model(**source.inputs)
            states = model.module.get_input_embeddings()(run.inputs["input_ids"]).detach().requires_grad_()
            rest = {name: value for name, value in run.inputs.items() if name != "input_ids"}
            torch.autograd.grad(metric(model(inputs_embeds=states, **rest), run).sum(), states)

    data = PatchingData(batches, corrupt, metric)
    peers = {"plain": plain, "attribution": lambda: AttributionPatching().score(model, data)}
    seconds = cpu_seconds(peers, rounds)
    return {"two_forwards_and_a_backward_s": seconds["plain"], "ratio": seconds["attribution"] / seconds["plain"]}


def agreement(subject: Subject, rounds: int) -> dict[str, float]:
    """Spearman correlation over heads of the gradient scores with the exact rise of the loss; trained weights only."""
    if not subject.trained:
        return {}
    model, task = subject.model, subject.task
    exact = AblationImportance().score(model, task)
    gradients = {"absolute": GradientImportance(), "signed": GradientImportance(signed=True)}
    return {name: score.score(model, task).rank_correlation(exact) for name, score in gradients.items()}


SUBJECTS: dict[str, Callable[[], Subject]] = {"gpt2": gpt2_shape, "minilm": minilm, "gemma": gemma}
MEASUREMENTS = [recording, gradient, ablation, patching, agreement]


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=[measurement.__name__ for measurement in MEASUREMENTS])
    parser.add_argument("--subject", choices=[*SUBJECTS], action="append", help="repeatable; default all")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "heads.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "what": "CPU time on one thread, as ratios; see benchmarks/heads.py",
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("polyhead", "torch", "transformers")},
        "subjects": {},
    }
    for make in [SUBJECTS[name] for name in arguments.subject or SUBJECTS]:
        subject = make()
        found = results["subjects"].setdefault(subject.name, {})
        for measurement in MEASUREMENTS:
            if arguments.only in (None, measurement.__name__):
                found[measurement.__name__] = measurement(subject, arguments.rounds)
                print(subject.name, measurement.__name__, json.dumps(found[measurement.__name__]), flush=True)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
