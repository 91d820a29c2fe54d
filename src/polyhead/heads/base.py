"""The contract of a score: a model and data in, one number a head out."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from polyhead.headmap import HeadMap

if TYPE_CHECKING:
    import torch

    from polyhead.model import HeadedModel

__all__ = ["Needs", "Progress", "Score", "scores"]

Progress = Callable[[int, int | None], None]
Needs = Literal["weights", "texts", "task", "needles", "relations", "images", "other"]


class Score(ABC):
    """Measures every head of a model. Knobs are constructor arguments; measuring changes nothing in the model.

    Attributes:
        name: on the command line and of the map.
        summary: one line, what is measured.
        needs: the kind of data: "weights" (none), "texts" (a list of strings), "task" (a :class:`Task`), "needles",
            "relations", "images", or "other": see the class.
        higher_means: what a high value says of a head.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    needs: ClassVar[Needs]
    higher_means: ClassVar[str]

    @abstractmethod
    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """One value for each head.

        Args:
            model: any loaded model.
            data: what ``needs`` says.
            progress: called with what is done and what there is to do.

        Raises:
            InputError: data of another kind, or a model that the score is not defined for.
        """

    def _map(self, values: np.ndarray | torch.Tensor, model: HeadedModel, data: str = "") -> HeadMap:
        """A map with this score's name and meaning; values ``[layers, heads]``."""
        plain = values if isinstance(values, np.ndarray) else values.detach().double().cpu().numpy()
        return HeadMap(plain, self.name, model.name, data, self.higher_means)


def scores() -> dict[str, type[Score]]:
    """Every score of this package by name: each is a class in a module of ``polyhead.heads``."""
    package = importlib.import_module("polyhead.heads")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"polyhead.heads.{module.name}")
    found: dict[str, type[Score]] = {}
    pending: list[Any] = [Score]
    while pending:
        for kind in list(pending.pop().__subclasses__()):
            pending.append(kind)
            named = "name" in vars(kind) and not getattr(kind, "__abstractmethods__", None)
            if named and kind.__module__.startswith("polyhead.heads."):  # a base that others share has no name
                found[kind.name] = kind
    return dict(sorted(found.items()))
