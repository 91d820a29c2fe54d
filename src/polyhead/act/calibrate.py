"""ACT: attention calibration. Sinks that appear after the first token give attention back."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from polyhead.act.attention import AttentionAction, Run
from polyhead.act.vectors import Heads
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.tasks import Task, run_task
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.heads.base import Progress
    from polyhead.model import HeadedModel

__all__ = ["AttentionCalibration", "calibration_gain", "find_sinks"]


@paper("act-attention-calibration")
def find_sinks(weights: torch.Tensor, threshold: float = 5.0, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Columns that receive ``threshold`` times more attention than an even share: ``[batch, heads, keys]`` boolean.

    A column's mean is over the queries that can see it, ``sum_q A[q, k] / (n - k)`` with a causal mask; it is a sink
    where that exceeds ``threshold / n``, ``n`` the tokens of the text. The first token counts as one where it is one.

    Args:
        weights: ``[batch, heads, tokens, tokens]`` of a whole text.
        threshold: in even shares.
        mask: ``[batch, tokens]``, True for tokens that are no padding.
    """
    real = torch.ones_like(weights[:, 0, 0], dtype=torch.bool) if mask is None else mask
    rows = real[:, None, :, None]
    seen = ((weights > 0) & rows).sum(-2).clamp(min=1)
    received = (weights * rows).sum(-2) / seen
    return (received > threshold / real.sum(-1)[:, None, None]) & real[:, None]


@paper("act-attention-calibration")
class AttentionCalibration(AttentionAction):
    """Sinks other than the first token keep ``beta`` of their attention; the rest goes to tokens that are no sinks.

    Each row hands the freed weight out in proportion to what the other tokens have, so that it still sums to 1. The
    first token is left alone. Sinks are found in each text anew; the steps of a generation use those of the prompt.

    Args:
        beta: share that a sink keeps; 1 changes nothing.
        threshold: of :func:`find_sinks`, in even shares.
        heads: which heads; None for all. :func:`calibration_gain` finds those that profit.

    Example:
        >>> import polyhead, torch
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> with AttentionCalibration(heads=[(3, 0)]).on(model), torch.no_grad():
        ...     _ = model(**model.tokenize(["A comma, a full stop. And words."]))
    """

    name: ClassVar[str] = "calibrate"
    summary: ClassVar[str] = "take attention from sinks after the first token"

    def __init__(self, beta: float = 0.4, threshold: float = 5.0, heads: Heads = None) -> None:
        super().__init__(heads)
        if not 0 <= beta <= 1:
            raise InputError(f"beta is {beta}, expected the share that sinks keep, 0 to 1.")
        self.beta, self.threshold = beta, threshold

    def reweigh(self, layer: int, weights: torch.Tensor, run: Run) -> torch.Tensor | None:
        """See :class:`AttentionAction`."""
        if self.beta == 1:
            return None
        tokens, keys = weights.shape[-2:]
        if tokens == keys:
            run.kept[layer] = find_sinks(weights, self.threshold, run.mask)
        known = run.kept.get(layer)
        if known is None:
            return None
        if known.shape[-1] > keys:
            known = known[..., -keys:]  # a sliding window dropped the oldest
        sinks = torch.nn.functional.pad(known, (0, keys - known.shape[-1]))[:, :, None]
        first = _first(run.mask, sinks)
        freed = weights * (sinks & ~first) * (1 - self.beta)
        takers = weights * ~(sinks | first)
        total = takers.sum(-1, keepdim=True)
        share = torch.where(total > 0, takers / total.clamp(min=1e-20), torch.zeros_like(takers))
        return torch.where(total > 0, weights - freed + share * freed.sum(-1, keepdim=True), weights)


def _first(mask: torch.Tensor | None, sinks: torch.Tensor) -> torch.Tensor:
    """Boolean ``[batch or 1, 1, 1, keys]``, True for each text's first token; padding may come before it."""
    keys = sinks.shape[-1]
    at = torch.zeros(1, dtype=torch.long, device=sinks.device) if mask is None else mask[:, -keys:].int().argmax(-1)
    return (torch.arange(keys, device=sinks.device) == at[:, None])[:, None, None]


@paper("act-attention-calibration")
def calibration_gain(
    model: HeadedModel,
    task: Task,
    *,
    beta: float = 0.4,
    threshold: float = 5.0,
    by: str = "head",
    progress: Progress | None = None,
) -> HeadMap:
    """Gain in a task's quality when one head, or all heads of one layer, is calibrated: ``[layers, heads]``.

    The first two layers and the last are skipped (NaN), as in the paper. ``(map.values >= 0)`` are the heads to treat.

    Args:
        model: any that attends through transformers' interface.
        task: held-out examples.
        beta, threshold: of :class:`AttentionCalibration`.
        by: "head", or "layer" for a cheaper, coarser search.
    """
    if by not in ("head", "layer"):
        raise InputError(f"by is {by!r}, expected 'head' or 'layer'.")
    rows = np.arange(sum(batch.examples for batch in task.batches(model)))
    plain = task.quality(run_task(task, model), rows)
    values = np.full((model.layers, model.heads), np.nan)
    groups = []
    for layer in range(2, model.layers - 1):
        heads = [(layer, head) for head in range(model.attention_layers[layer].heads)]
        groups += [heads] if by == "layer" else [[head] for head in heads]
    for done, group in enumerate(groups, start=1):
        with AttentionCalibration(beta, threshold, group).on(model):
            gain = task.quality(run_task(task, model), rows) - plain
        for at in group:
            values[at] = gain
        if progress is not None:
            progress(done, len(groups))
    return HeadMap(values, "calibration-gain", model.name, task.name, "calibrating the head helps the task")
