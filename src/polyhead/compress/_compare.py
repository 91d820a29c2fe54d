"""Two models side by side: what a transform's report says of the outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyhead.compress.report import Report, cost_of
from polyhead.heads.tasks import Task, run_task
from polyhead.structure import probe_inputs

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["change_of", "difference_of", "output_of", "quality_of", "random_inputs", "report_of", "tolerance_of"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def tolerance_of(model: HeadedModel) -> float:
    """Largest difference, relative to the largest output, that rounding explains in the model's dtype."""
    return _TOLERANCE.get(model.dtype, 1e-5)


def random_inputs(model: HeadedModel) -> dict[str, torch.Tensor]:
    """Two inputs of the kind the model takes, the same every time."""
    generator = torch.Generator().manual_seed(0)
    inputs = probe_inputs(model.module)
    key, value = next(iter(inputs.items()))
    if value.is_floating_point():
        made = torch.randn(2, *value.shape[1:], generator=generator).to(value.device, value.dtype)
        return {key: made}
    vocabulary = int(getattr(model.config, "vocab_size", None) or 8)
    ids = torch.randint(vocabulary, (2, 12), generator=generator).to(value.device)
    ids[:, -1] = value[0, -1]
    return {key: ids, "attention_mask": torch.ones_like(ids)}


def output_of(model: HeadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's first output in evaluation mode, float64; the mode is put back."""
    training = model.module.training
    model.module.eval()
    try:
        with torch.no_grad():
            found: torch.Tensor = model(**inputs)[0]
    finally:
        model.module.train(training)
    return found.double()


def difference_of(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, over the largest expected value."""
    return float((given - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def change_of(given: torch.Tensor, before: torch.Tensor) -> float:
    """Length of the difference, as a share of the length before."""
    return float((given - before).norm() / before.norm().clamp(min=1e-30))


def quality_of(task: Task | None, before: HeadedModel, after: HeadedModel) -> tuple[tuple[float, float] | None, str]:
    """A task's quality before and after with its name, or nothing without a task."""
    if task is None:
        return None, ""
    found = [run_task(task, each) for each in (before, after)]
    first, second = (task.quality(each, np.arange(len(each))) for each in found)
    return (first, second), task.metric


def report_of(
    before: HeadedModel,
    after: HeadedModel,
    task: Task | None,
    *,
    parity: float | None = None,
    details: dict[str, Any] | None = None,
) -> Report:
    """What a transform did: cost, a task's quality, and the change of the output on random inputs."""
    inputs = random_inputs(before)
    quality, metric = quality_of(task, before, after)
    return Report(
        cost_of(before),
        cost_of(after),
        parity=parity,
        quality=quality,
        metric=metric,
        change=change_of(output_of(after, inputs), output_of(before, inputs)),
        details=details or {},
    )
