"""What an action on heads costs or gains on a task, with its interval, beside the same action on random heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.errors import InputError
from polyhead.evaluate.statistics import Interval, bootstrap_of
from polyhead.heads.tasks import run_task

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from polyhead.headmap import HeadMap
    from polyhead.heads.tasks import Task
    from polyhead.model import HeadedModel

__all__ = ["ActionReport", "chosen_heads", "measure_action"]

Heads = Sequence[tuple[int, int]]
Put = Callable[[Heads], "AbstractContextManager[Any]"]
Progress = Callable[[int, "int | None"], None]


@dataclass(frozen=True)
class ActionReport:
    """One action, measured.

    Attributes:
        action, task, metric, model: what was done to what, and how it was judged; higher is better.
        heads: the ``(layer, head)`` acted on.
        before, after: quality without and with the action, with 95% bootstrap intervals over the examples.
        difference: after less before, paired.
        random: quality after the same action on as many heads drawn at random, one value a draw.
        beats_random: after less the mean of the random draws, paired; None without draws.
    """

    action: str
    task: str
    metric: str
    model: str
    heads: list[tuple[int, int]]
    before: Interval
    after: Interval
    difference: Interval
    random: list[float] = field(default_factory=list)
    beats_random: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)


def chosen_heads(head_map: HeadMap, fraction: float, *, highest: bool = False) -> list[tuple[int, int]]:
    """The lowest (or highest) heads of a map, as many as ``fraction`` of those with a value.

    Raises:
        InputError: a fraction outside 0 to 1, or one so small that no head is chosen.
    """
    heads = (head_map if highest else -head_map).top(float(fraction))
    if not heads:
        known = int(np.isfinite(head_map.values).sum())
        raise InputError(f"A fraction of {fraction:g} of {known} heads is none; give at least {1 / max(1, known):.3g}.")
    return heads


def measure_action(
    model: HeadedModel,
    task: Task,
    heads: Heads,
    put: Put,
    *,
    name: str = "action",
    draws: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> ActionReport:
    """Quality of a task before and after an action on some heads.

    Args:
        model: the loaded model.
        task: what it is judged by.
        heads: to act on.
        put: ``put(heads)`` gives the context that acts on them.
        name: of the action, for the report.
        draws: of as many random heads, for comparison.
        seed: of the draws and the bootstrap.
        progress: called with task runs done and to do.
    """
    tell = progress or (lambda done, total: None)
    before = run_task(task, model)
    tell(1, 2 + draws)
    with put(heads):
        after = run_task(task, model)
    tell(2, 2 + draws)
    generator = np.random.default_rng(seed)
    everyone = [(at.index, head) for at in model.attention_layers for head in range(at.heads)]
    others = []
    for draw in range(draws):
        picked = generator.choice(len(everyone), len(heads), replace=False)
        with put([everyone[int(i)] for i in picked]):
            others.append(run_task(task, model))
        tell(3 + draw, 2 + draws)
    n, quality = len(before), task.quality
    rows = np.arange(n)
    beats = None
    if others:
        beats = bootstrap_of(
            lambda r: quality(after, r) - float(np.mean([quality(o, r) for o in others])), n, seed=seed
        )
    return ActionReport(
        name,
        task.name,
        task.metric,
        model.name,
        list(heads),
        bootstrap_of(lambda r: quality(before, r), n, seed=seed),
        bootstrap_of(lambda r: quality(after, r), n, seed=seed),
        bootstrap_of(lambda r: quality(after, r) - quality(before, r), n, seed=seed),
        [quality(other, rows) for other in others],
        beats,
    )
