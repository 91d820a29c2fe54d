"""The contract of a laboratory experiment: a theory of attention on toy data, seeded, measured and drawn."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from polyhead.claims.base import Evidence, Scale
from polyhead.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Experiment", "draw", "experiments", "find"]


@dataclass(frozen=True)
class Experiment:
    """One experiment of one file.

    Attributes:
        id: of its paper.
        question: what it asks, in a sentence.
        run: ``(scale, seed) -> Evidence``: seconds at "smoke", under five minutes at "full". Whatever the plot shows is
            in the evidence's ``details``.
        draw: puts the evidence on an empty figure.
    """

    id: str
    question: str
    run: Callable[[Scale, int], Evidence]
    draw: Callable[[Evidence, Figure], None]


def experiments() -> dict[str, Experiment]:
    """All experiments of this room by the ids of their papers, sorted."""
    import polyhead.lab as room

    found = {}
    for module in pkgutil.iter_modules(room.__path__):
        made = getattr(importlib.import_module(f"polyhead.lab.{module.name}"), "EXPERIMENT", None)
        if isinstance(made, Experiment):
            found[made.id] = made
    return dict(sorted(found.items()))


def find(id: str) -> Experiment:
    """The experiment of a paper.

    Raises:
        InputError: there is none.
    """
    known = experiments()
    if id not in known:
        raise InputError(f"No experiment '{id}' here; there are {', '.join(known)}.")
    return known[id]


def draw(experiment: Experiment, evidence: Evidence, path: str | Path | None = None) -> Figure:
    """The experiment's picture of its evidence, written to ``path`` where one is given.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Pictures need matplotlib: pip install 'polyhead[plot]'") from error
    figure = Figure(figsize=(9, 4), layout="constrained")
    experiment.draw(evidence, figure)
    figure.suptitle(f"{experiment.question} ({evidence.verdict})", fontsize=11)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
