"""How an objective is called with the vectors of a batch, whatever its columns are."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from polyhead.objectives import Loss, Objective

__all__ = ["Wrapper", "embedding_loss", "takes"]


class Wrapper(nn.Module):
    """An objective that calls another one, perhaps several times, with changed vectors.

    Args:
        objective: called like :class:`~polyhead.objectives.Objective`; a bare loss gets its own similarity.
    """

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = Objective(objective) if isinstance(objective, Loss) else objective


def takes(objective: nn.Module) -> set[str]:
    """Names of the arguments that an objective, or the one inside a wrapper, is called with."""
    while isinstance(objective, Wrapper):
        objective = objective.objective
    return set(inspect.signature(objective.forward).parameters)


def embedding_loss(objective: nn.Module, embeddings: Sequence[Tensor], labels: Tensor | None) -> Tensor:
    """An objective's value for the columns of a batch.

    Args:
        objective: of the arguments ``(embeddings, relation, other)``, or ``(embeddings, labels)``, or ``(x, y)``.
        embeddings: ``[batch, dim]``, one tensor a column of texts: anchors, positives, negatives.
        labels: ``[batch]`` classes (one column) or scores (two columns), or None.
    """
    anchors, *others = embeddings
    other = torch.cat(others) if others else None
    if "other" in inspect.signature(objective.forward).parameters:
        return cast(Tensor, objective(anchors, labels, other))
    return cast(Tensor, objective(anchors, labels if other is None else other))
