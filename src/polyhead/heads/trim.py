"""Less padding for the same numbers: a batch cut into pieces of examples of about one length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from polyhead.heads.tasks import Batch, Task

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Piece", "Trimmer"]

Piece = tuple[np.ndarray, Batch]  # which examples of the batch, and the batch of these alone
_TOLERANCE = 1e-4


class Trimmer:
    """Cuts a task's batches into pieces of examples of like length, without the padding columns a piece has no use for.

    Half of what a batch of sentences holds may be padding. The first batch that can be cut is run whole and in pieces;
    where the task's predictions are not the same to 1e-4 (it looks at fixed columns), batches stay whole from then on,
    as they do where the mask does not end in padding.

    Args:
        model: that will run them.
        task: whose predictions must stay as they are.
        examples: in a piece.
    """

    def __init__(self, model: HeadedModel, task: Task, examples: int = 4) -> None:
        self.model, self.task, self.examples = model, task, examples
        self._same: bool | None = None

    def pieces(self, batch: Batch) -> list[Piece]:
        """The pieces of a batch, or the batch whole as one."""
        found = [] if self._same is False else _cut(batch, self.examples)
        if found and self._same is None:
            self._same = self._gives_the_same(batch, found)
        return found if found and self._same else [(np.arange(batch.examples), batch)]

    def _gives_the_same(self, batch: Batch, found: list[Piece]) -> bool:
        with torch.inference_mode():
            expected = self.task.predict(self.model(**batch.inputs), batch)
            given = torch.cat([self.task.predict(self.model(**part.inputs), part) for _, part in found])
        expected = expected[np.concatenate([examples for examples, _ in found])]
        tolerance = _TOLERANCE * float(expected.abs().max().clamp(min=1.0))
        return given.shape == expected.shape and torch.allclose(given, expected, 0, tolerance)


def _cut(batch: Batch, examples: int) -> list[Piece]:
    """Pieces of a batch that is text padded on the right and would shrink by a tenth or more; else none."""
    mask = batch.inputs.get("attention_mask")
    flat = all(value.dim() == 1 for value in batch.targets.values())
    if mask is None or mask.dim() != 2 or not flat or not all(v.shape == mask.shape for v in batch.inputs.values()):
        return []
    if batch.examples <= 1 or bool((mask[:, 1:] > mask[:, :-1]).any()):
        return []
    lengths = mask.sum(1).reshape(batch.examples, -1).amax(1)
    order = torch.argsort(lengths, descending=True, stable=True)
    groups = [group.cpu().numpy() for group in order.split(examples)]
    longest = [int(lengths[group].max()) for group in groups]
    columns = sum(length * len(group) for length, group in zip(longest, groups, strict=True))
    if columns > 0.9 * mask.shape[1] * batch.examples:
        return []
    return [(group, _piece(batch, group, length)) for group, length in zip(groups, longest, strict=True)]


def _piece(batch: Batch, examples: np.ndarray, length: int) -> Batch:
    of_rows = next(iter(batch.inputs.values())).shape[0] // batch.examples
    rows = (examples[:, None] * of_rows + np.arange(of_rows)).ravel()
    inputs = {key: value[rows, :length] for key, value in batch.inputs.items()}
    return Batch(inputs, {key: value[examples] for key, value in batch.targets.items()}, len(examples))
