"""Change one head at a time, exactly and fast: only what lies above the changed layer is run, many heads in a batch.

The model runs once and what leaves each block is kept. For a head of layer ``l`` the model's own forward runs again
with the blocks below ``l`` and the attention of ``l`` handing on what they gave before, on a batch that holds the
inputs several times over, each copy with another head changed. The cost of all heads is about half of as many forward
passes, and less where padding is cut off and where one run of many copies is faster than many runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.heads.resume import BlockStates, block_states, without_cache
from polyhead.heads.tasks import Batch, Task
from polyhead.heads.trim import Trimmer

if TYPE_CHECKING:
    from polyhead.heads.base import Progress
    from polyhead.model import HeadedModel

__all__ = ["Change", "Swept", "every_head", "sweep", "sweep_losses"]

Change = Callable[[int, Sequence[int], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Swept:
    """What the model gave with some heads of one layer changed, each in its own copy of the batch.

    Attributes:
        layer: of the heads.
        heads: one a copy.
        outputs: of the model, ``[copies * rows, ...]``: copy after copy.
        batch: the batch as often as there are copies.
    """

    layer: int
    heads: list[int]
    outputs: Any
    batch: Batch


def every_head(model: HeadedModel) -> list[tuple[int, int]]:
    """All ``(layer, head)`` of a model, layer by layer."""
    return [(layer.index, head) for layer in model.attention_layers for head in range(layer.heads)]


def sweep(
    model: HeadedModel,
    batch: Batch,
    change: Change,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    heads_at_once: int | None = None,
) -> Iterator[Swept]:
    """Run a batch with each head changed in turn; the values are those of a plain loop over heads.

    Models whose blocks cannot be skipped (ALBERT runs one block many times) run whole, heads still batched. Run it
    under ``torch.inference_mode()`` where no gradients are wanted. Actions that are on stay on.

    Args:
        model: any loaded model.
        batch: what it is called with.
        change: ``change(layer, heads, z) -> z'`` for ``z`` ``[copies, rows, tokens, head_dim]``, the output of head
            ``heads[i]`` in copy ``i``; ``torch.zeros_like`` of z switches the heads off.
        heads: ``(layer, head)`` to change; None for all.
        heads_at_once: copies of the batch in one run; memory grows with it. None takes as many as make 2048 tokens
            on a CPU, whose caches more would not fit, and 32768 elsewhere.

    Example:
        >>> model, task = load("all-MiniLM-L6-v2"), task_for(load("all-MiniLM-L6-v2"), limit=32)
        >>> batch = task.batches(model)[0]
        >>> with torch.inference_mode():
        ...     found = list(sweep(model, batch, lambda layer, heads, z: torch.zeros_like(z)))
        >>> len(found), found[0].heads
        (72, [0])
    """
    if heads_at_once is not None and heads_at_once < 1:
        raise InputError(f"heads_at_once is {heads_at_once}, expected 1 or more.")
    wanted: dict[int, list[int]] = {}
    for layer, head in every_head(model) if heads is None else heads:
        wanted.setdefault(layer, []).append(head)
    states = block_states(model, batch) if wanted else None
    many = heads_at_once or _copies_that_fit(model, batch, states)
    for layer, all_heads in sorted(wanted.items()):
        for first in range(0, len(all_heads), many):
            some = all_heads[first : first + many]
            copies = batch.repeat(len(some))
            with ExitStack() as stack:
                if states is not None:
                    stack.enter_context(states.resumed_at(layer, len(some)))
                stack.enter_context(model.tap_heads(_changing(change, some), layers=[layer]))
                outputs = model(**without_cache(model, copies.inputs))
            yield Swept(layer, some, outputs, copies)


def sweep_losses(
    model: HeadedModel,
    task: Task,
    change: Change,
    *,
    heads: Sequence[tuple[int, int]] | None = None,
    heads_at_once: int | None = None,
    trim: bool = True,
    progress: Progress | None = None,
) -> np.ndarray:
    """Loss of every example with each head changed, ``[layers, heads, examples]`` float64; NaN where not asked for.

    Args:
        model, change, heads, heads_at_once: as for :func:`sweep`.
        task: its batches are run, its loss is taken.
        trim: cut batches into pieces of less padding, see :class:`~polyhead.heads.trim.Trimmer`.
        progress: called with the batches done and all of them.
    """
    batches = task.batches(model)
    losses = np.full((model.layers, model.heads, sum(batch.examples for batch in batches)), np.nan)
    trimmer = Trimmer(model, task)
    first = 0
    for done, batch in enumerate(batches, start=1):
        parts = trimmer.pieces(batch) if trim else [(np.arange(batch.examples), batch)]
        for examples, part in parts:
            with torch.inference_mode():
                for found in sweep(model, part, change, heads=heads, heads_at_once=heads_at_once):
                    loss = task.loss(task.predict(found.outputs, found.batch), found.batch)
                    rows = loss.double().reshape(len(found.heads), part.examples).cpu().numpy()
                    losses[found.layer, np.array(found.heads)[:, None], first + examples] = rows
        first += batch.examples
        if progress is not None:
            progress(done, len(batches))
    return losses


def _copies_that_fit(model: HeadedModel, batch: Batch, states: BlockStates | None) -> int:
    if states is not None:
        tokens = states.tokens
    else:
        main = next(iter(batch.inputs.values()))
        tokens = main.numel() if main.dim() == 2 else 256 * main.shape[0]
    return max(1, (2048 if model.device.type == "cpu" else 32768) // tokens)


def _changing(change: Change, heads: Sequence[int]) -> Callable[[int, torch.Tensor], torch.Tensor]:
    def callback(layer: int, z: torch.Tensor) -> torch.Tensor:
        copies = z.unflatten(0, (len(heads), -1)).clone()
        own = torch.stack([copies[copy, ..., head, :] for copy, head in enumerate(heads)])
        for copy, (head, changed) in enumerate(zip(heads, change(layer, heads, own), strict=True)):
            copies[copy, ..., head, :] = changed
        return copies.flatten(0, 1)

    return callback
