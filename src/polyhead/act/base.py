"""The contract of an action: put on a model's heads for the time of a ``with`` block, taken off whatever happens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Action", "HeadAction", "head_values"]


class Action(ABC):
    """Changes what heads do, reversibly: ``with action.on(model): ...``. Actions compose by nesting.

    Attributes:
        name: on the command line.
        summary: one line, what is changed.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def on(self, model: HeadedModel) -> AbstractContextManager[None]:
        """Acts in every forward pass of this thread, gradients included, until the block ends."""


class HeadAction(Action):
    """An action on head outputs, before the output projection."""

    @abstractmethod
    def change(self, layer: int, heads: torch.Tensor) -> torch.Tensor | None:
        """The head outputs ``[batch, tokens, heads, head_dim]`` that the model goes on with; None leaves them."""

    def check(self, model: HeadedModel) -> None:
        """Raise InputError where the action does not fit the model; called before it is put on."""

    @contextmanager
    def on(self, model: HeadedModel) -> Iterator[None]:
        """See :class:`Action`."""
        self.check(model)
        with model.tap_heads(self.change):
            yield


def head_values(
    given: HeadMap | np.ndarray | torch.Tensor, model: HeadedModel, what: str = "values"
) -> np.ndarray | torch.Tensor:
    """The ``[layers, heads]`` values of a map, array or tensor, checked against a model's shape.

    Raises:
        InputError: another shape.
    """
    values = given.values if isinstance(given, HeadMap) else given
    expected = (model.layers, model.heads)
    if tuple(values.shape) != expected:
        raise InputError(
            f"The {what} have the shape {list(values.shape)}; '{model.name}' has {expected[0]} layers x {expected[1]} "
            "heads, so one value for each is expected."
        )
    return values
