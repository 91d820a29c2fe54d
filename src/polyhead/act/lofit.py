"""LoFiT: fine-tune a model through offsets on a few of its heads."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from polyhead.act.base import HeadAction
from polyhead.act.steer import Steer
from polyhead.act.vectors import Heads
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.tasks import Task
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.heads.base import Progress
    from polyhead.model import HeadedModel

__all__ = ["LoFiT", "fold"]


class _Scale(HeadAction):
    name, summary = "lofit-scale", "scale every feature of head outputs"

    def __init__(self, scale: torch.Tensor) -> None:
        self.scale = scale

    def change(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        scale = self.scale[layer, : heads.shape[-2], : heads.shape[-1]]
        return heads * (1 + scale).to(heads.dtype)


@paper("lofit")
@dataclass
class LoFiT:
    """Localised fine-tuning: find the heads that a task can be taught through, then learn an offset for each.

    First a vector ``A`` a head is learned, ``z <- (1 + A) z``, with an L1 penalty; the norm of ``A`` ranks heads
    (:meth:`localize`). Then ``A`` is thrown away and an offset ``v`` is learned for the best heads, ``z <- z + v`` at
    every token (:meth:`fit`), which gives a :class:`Steer`. The model's own weights stay as they are; :func:`fold`
    puts the offsets into a copy.

    Args:
        steps: optimiser steps of each stage, one batch a step, over and over.
        learning_rate: of Adam.
        l1: weight of the penalty on ``A``, summed over its entries.
        seed: of the starting values and the order of batches.

    Example:
        >>> import polyhead
        >>> from polyhead.heads.tasks import task_for
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> tuner, task = LoFiT(steps=2), task_for(model, limit=32)
        >>> heads = tuner.localize(model, task).top(4)
        >>> offsets = tuner.fit(model, task, heads)
        >>> with offsets.on(model):
        ...     states = model(**model.tokenize(["tuned"])).last_hidden_state
    """

    steps: int = 50
    learning_rate: float = 5e-3
    l1: float = 5e-4
    seed: int = 0

    def localize(self, model: HeadedModel, task: Task, *, progress: Progress | None = None) -> HeadMap:
        """Norm of each head's learned scale, ``[layers, heads]``."""
        scale = self._start(model)
        self._train(model, task, scale, _Scale(scale), self.l1, progress)
        values = scale.detach().double().norm(dim=-1).cpu().numpy()
        return HeadMap(values, "lofit", model.name, task.name, "scaling the head changes the task")

    def fit(self, model: HeadedModel, task: Task, heads: Heads = None, *, progress: Progress | None = None) -> Steer:
        """Offsets for ``heads``, learned on the task's loss; others stay without."""
        offset = self._start(model)
        self._train(model, task, offset, Steer(offset, heads=heads), 0.0, progress)
        return Steer(offset.detach(), heads=heads)

    def _start(self, model: HeadedModel) -> nn.Parameter:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (model.layers, model.heads, model.head_dim)
        return nn.Parameter((1e-3 * torch.randn(shape, generator=generator)).to(model.device))

    def _train(
        self,
        model: HeadedModel,
        task: Task,
        parameter: nn.Parameter,
        action: HeadAction,
        l1: float,
        progress: Progress | None,
    ) -> None:
        batches = task.batches(model)
        if not batches:
            raise InputError(f"The task '{task.name}' has no examples to learn from.")
        optimizer = torch.optim.Adam([parameter], lr=self.learning_rate)
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        for step in range(self.steps):
            order = order or torch.randperm(len(batches), generator=generator).tolist()
            batch = batches[order.pop()]
            with action.on(model), torch.enable_grad():
                loss = task.loss(task.predict(model(**batch.inputs), batch), batch).mean()
            loss = loss + l1 * parameter.abs().sum()
            # Of this parameter alone: the model's own weights neither need gradients nor get any.
            (parameter.grad,) = torch.autograd.grad(loss, [parameter])
            optimizer.step()
            if progress is not None:
                progress(step + 1, self.steps)


@paper("lofit")
def fold(model: HeadedModel, offsets: Steer) -> HeadedModel:
    """A copy of the model with the offsets in the bias of its output projections: ``b <- b + sum_h v_h W_O[h]``.

    A projection without a bias gets one, which a stock configuration may not have (``attention_bias`` of Llama).

    Raises:
        InputError: offsets that act on some tokens only, or layers that share one projection.
    """
    from polyhead.model import HeadedModel

    offsets.check(model)
    if not (isinstance(offsets.positions, str) and offsets.positions == "all"):
        raise InputError(f"Offsets at {offsets.positions} tokens cannot be a bias; only offsets at all tokens can.")
    if len({id(layer.output_projection) for layer in model.attention_layers}) < model.layers:
        raise InputError(f"Layers of '{model.name}' share one output projection: it cannot have a bias for each.")
    folded = HeadedModel(copy.deepcopy(model.module), name=model.name, files=model.files)
    for layer in folded.attention_layers:
        vectors = offsets.vectors[layer.index, : layer.heads, : layer.head_dim].double()
        vectors = vectors * offsets.chosen[layer.index, : layer.heads, None] * offsets.strength
        with torch.no_grad():
            weight = folded.output_weight(layer.index)
            added = torch.einsum("hd,hdm->m", vectors.to(weight.device), weight.double()).to(weight.dtype)
            bias = folded.output_bias(layer.index)
            layer.output_projection.bias = nn.Parameter(added if bias is None else bias + added)
    return folded
