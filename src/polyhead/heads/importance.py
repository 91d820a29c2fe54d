"""What heads are worth for a task (Michel et al., sixteen-heads): by gradient, by switching each off, and greedily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from polyhead.act.gate import Gate
from polyhead.errors import InputError
from polyhead.heads.base import Needs, Progress, Score
from polyhead.heads.suffix import Change, every_head, sweep_losses
from polyhead.heads.tasks import Batch, Task, task_for
from polyhead.heads.trim import Trimmer
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.headmap import HeadMap
    from polyhead.model import HeadedModel

__all__ = ["AblationImportance", "GradientImportance", "GreedyImportance", "mean_head_outputs", "per_row_gates"]

Ablation = Literal["zero", "mean"]


def _task_of(data: Any, model: HeadedModel, score: str) -> Task:
    if data is None:
        return task_for(model, limit=64)
    if not isinstance(data, Task):
        raise InputError(f"'{score}' was given {type(data).__name__}; expected a Task, such as task_for(model).")
    return data


@contextmanager
def per_row_gates(model: HeadedModel, gates: torch.Tensor) -> Iterator[None]:
    """Gates of its own for every row of a batch, ``[rows, layers, heads]``; gradients flow to them."""

    def gated(layer: int, z: torch.Tensor) -> torch.Tensor:
        own = gates[:, layer, : z.shape[-2]].to(z.dtype)
        return (z.unflatten(0, (len(own), -1)) * own.reshape(len(own), *[1] * (z.dim() - 2), -1, 1)).flatten(0, 1)

    with model.tap_heads(gated):
        yield


@paper("sixteen-heads")
@dataclass
class GradientImportance(Score):
    """``I_h = mean over examples x of |d loss(x) / d xi_h|`` at gates ``xi = 1`` (sixteen-heads, equation 2).

    One forward and one backward pass a batch for all heads: each example has gates of its own, and gradients of the
    weights are not computed. ``d loss / d xi_h = z_h . d loss / d z_h``, so this is the first-order estimate of what
    switching head ``h`` off does, its sign dropped.

    Args:
        normalise: divide each layer's values by their l2 norm, as the paper does; without, layers can be compared.
        signed: mean of ``-d loss / d xi_h`` instead: the estimated rise of the loss without the head.

    Example:
        >>> from polyhead import load
        >>> GradientImportance().score(load("all-MiniLM-L6-v2")).shape
        (6, 12)
    """

    normalise: bool = False
    signed: bool = False

    name: ClassVar[str] = "gradient-importance"
    summary: ClassVar[str] = "gradient of the loss by each head's gate: one forward and backward pass for all heads"
    needs: ClassVar[Needs] = "task"
    higher_means: ClassVar[str] = "the task's loss depends more on the head"

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; data is a :class:`Task`, by default of 64 examples."""
        task = _task_of(data, model, self.name)
        batches, trimmer = task.batches(model), Trimmer(model, task, examples=16)
        total = torch.zeros(model.layers, model.heads, dtype=torch.float64)
        for done, batch in enumerate(batches, start=1):
            # Whether trimming is safe costs a forward pass and a half to find out: not for two batches.
            for part in [part for _, part in trimmer.pieces(batch)] if len(batches) > 2 else [batch]:
                gradients = gate_gradients(model, task, part)
                total += (-gradients if self.signed else gradients.abs()).sum(0).double().cpu()
            if progress is not None:
                progress(done, len(batches))
        values = total.numpy() / sum(batch.examples for batch in batches)
        values[~_exists(model)] = np.nan
        if self.normalise:
            values /= np.maximum(np.sqrt(np.nansum(values**2, axis=1, keepdims=True)), 1e-300)
        return self._map(values, model, task.name)


def gate_gradients(model: HeadedModel, task: Task, batch: Batch) -> torch.Tensor:
    """``d loss(x) / d xi_h`` of each example of a batch, ``[examples, layers, heads]`` float32."""
    rows = next(iter(batch.inputs.values())).shape[0]
    gates = torch.ones(batch.examples, model.layers, model.heads, device=model.device, requires_grad=True)
    with torch.enable_grad(), per_row_gates(model, gates.repeat_interleave(rows // batch.examples, dim=0)):
        loss = task.loss(task.predict(model(**batch.inputs), batch), batch).sum()
        return torch.autograd.grad(loss, gates)[0]


@paper("sixteen-heads")
@dataclass
class AblationImportance(Score):
    """Rise of the mean loss when a head is switched off; exact, by :mod:`polyhead.heads.suffix`.

    Args:
        ablation: "zero" multiplies the head's output by 0, "mean" replaces it by its mean over the task's tokens.
        heads_at_once: in one run; None chooses.

    Example:
        >>> from polyhead import load
        >>> AblationImportance(ablation="mean").score(load("all-MiniLM-L6-v2")).shape
        (6, 12)
    """

    ablation: Ablation = "zero"
    heads_at_once: int | None = None

    name: ClassVar[str] = "ablation-importance"
    summary: ClassVar[str] = "rise of the loss when the head is switched off, or replaced by its mean"
    needs: ClassVar[Needs] = "task"
    higher_means: ClassVar[str] = "the task suffers more without the head"

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; data is a :class:`Task`, by default of 64 examples."""
        task = _task_of(data, model, self.name)
        rises = self.rises(model, task, progress=progress)
        return self._map(rises.mean(-1), model, task.name)

    def rises(self, model: HeadedModel, task: Task, *, progress: Progress | None = None) -> np.ndarray:
        """Rise of each example's loss, ``[layers, heads, examples]``: what a paired test or bootstrap needs."""
        if self.ablation not in ("zero", "mean"):
            raise InputError(f"ablation is {self.ablation!r}, expected 'zero' or 'mean'.")
        change = _zero if self.ablation == "zero" else _to_mean(mean_head_outputs(model, task))
        losses = sweep_losses(model, task, change, heads_at_once=self.heads_at_once, progress=progress)
        return losses - task_losses(model, task)


def _zero(layer: int, heads: Any, z: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(z)


def _to_mean(means: list[torch.Tensor]) -> Change:
    def change(layer: int, heads: Any, z: torch.Tensor) -> torch.Tensor:
        own = means[layer][torch.as_tensor(heads)].to(z)
        return own.reshape(len(own), *[1] * (z.dim() - 2), -1).expand_as(z)

    return change


def mean_head_outputs(model: HeadedModel, task: Task) -> list[torch.Tensor]:
    """Mean output of every head over the task's tokens that are no padding: one ``[heads, head_dim]`` a layer."""
    sums = [torch.zeros(at.heads, at.head_dim, dtype=torch.float64) for at in model.attention_layers]
    tokens = [0.0] * model.layers
    for batch in task.batches(model):
        mask = batch.inputs.get("attention_mask")

        def add(layer: int, z: torch.Tensor, mask: torch.Tensor | None = mask) -> None:
            flat = z.double().flatten(0, -3)
            fits = mask is not None and mask.dim() == 2 and mask.numel() == len(flat)
            weight = mask.reshape(-1).double() if fits and mask is not None else flat.new_ones(len(flat))
            sums[layer] += torch.einsum("t,thd->hd", weight, flat).cpu()
            tokens[layer] += float(weight.sum())

        with torch.inference_mode(), model.tap_heads(add):
            model(**batch.inputs)
    return [total / max(count, 1.0) for total, count in zip(sums, tokens, strict=True)]


def task_losses(model: HeadedModel, task: Task) -> np.ndarray:
    """Loss of every example of the model as it stands, ``[examples]`` float64."""
    found = []
    for batch in task.batches(model):
        with torch.inference_mode():
            found.append(task.loss(task.predict(model(**batch.inputs), batch), batch).double().cpu().numpy())
    return np.concatenate(found)


@paper("sixteen-heads")
@dataclass
class GreedyImportance(Score):
    """The order of greedy removal: in every step the heads whose absence costs least beside all removed before.

    A head's value is its place in the order over the number of heads, 1 for the last that stands. Each step sweeps
    all heads that are left.

    Args:
        heads_per_step: removed after each sweep.
        fraction: of the heads to remove; the rest are ranked by the last sweep.
    """

    heads_per_step: int = 1
    fraction: float = 1.0

    name: ClassVar[str] = "greedy-importance"
    summary: ClassVar[str] = "place in a greedy search that removes the least costly head again and again"
    needs: ClassVar[Needs] = "task"
    higher_means: ClassVar[str] = "the head was removed later"

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; data is a :class:`Task`, by default of 64 examples."""
        if self.heads_per_step < 1 or not 0 < self.fraction <= 1:
            raise InputError(
                f"heads_per_step is {self.heads_per_step} and fraction {self.fraction}; expected 1 or more, and above "
                "0 to 1."
            )
        task = _task_of(data, model, self.name)
        left: list[tuple[int, int]] = every_head(model)
        removed: list[tuple[int, int]] = []
        count = len(left)
        losses = np.zeros((model.layers, model.heads))
        while left and len(removed) < self.fraction * count:
            with Gate.off(removed, model).on(model):
                losses = sweep_losses(model, task, _zero, heads=left).mean(-1)
            least = sorted(left, key=lambda head: losses[head])[: self.heads_per_step]
            removed += least
            left = [head for head in left if head not in least]
            if progress is not None:
                progress(len(removed), round(self.fraction * count))
        order = removed + sorted(left, key=lambda head: losses[head])
        values = np.full((model.layers, model.heads), np.nan)
        for place, head in enumerate(order, start=1):
            values[head] = place / count
        return self._map(values, model, task.name)


def _exists(model: HeadedModel) -> np.ndarray:
    """Which ``[layers, heads]`` the model has, where its layers differ in width."""
    there = np.zeros((model.layers, model.heads), dtype=bool)
    for head in every_head(model):
        there[head] = True
    return there
