"""Causal head gating: what role a head has, told by gates learned on the task's own loss (causal-head-gating)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch

from polyhead.act.gate import Gate
from polyhead.errors import InputError
from polyhead.heads.base import Needs, Progress, Score
from polyhead.heads.suffix import every_head
from polyhead.heads.tasks import Task, task_for
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.headmap import HeadMap
    from polyhead.model import HeadedModel

__all__ = ["CausalHeadGating", "GatingRoles", "Role"]

Role = Literal["facilitating", "interfering", "irrelevant"]


@dataclass(frozen=True)
class GatingRoles:
    """Gates learned with a push to keep heads, and with a push to drop them.

    Attributes:
        keep: ``G+``, ``[layers, heads]`` in 0 to 1: low only where the head hurts.
        drop: ``G-``: high only where the head is needed.
        losses: mean task loss a step of each fit, without the push.
    """

    keep: np.ndarray
    drop: np.ndarray
    losses: dict[str, list[float]]

    @property
    def facilitating(self) -> np.ndarray:
        """``G-``: the task keeps the head although dropping is rewarded."""
        return self.drop

    @property
    def interfering(self) -> np.ndarray:
        """``1 - G+``: the task drops the head although keeping is rewarded."""
        return 1 - self.keep

    @property
    def irrelevant(self) -> np.ndarray:
        """``G+ (1 - G-)``: the push alone decides."""
        return self.keep * (1 - self.drop)

    def of(self, role: Role) -> np.ndarray:
        """The scores of one role, ``[layers, heads]``."""
        found: np.ndarray = getattr(self, role)
        return found


@paper("causal-head-gating")
@dataclass
class CausalHeadGating(Score):
    """A gate a head, ``sigma(a_h)``, learned on a task's loss with the weights frozen.

    Three fits: one without a push, and from its gates two more, minimising ``mean loss - strength * mean(clip(a, -clip,
    clip))`` for G+ (keep) and with ``+`` for G- (drop). The push breaks the tie of heads that the loss does not care
    for. Contrastive: ``loss(data) - loss(suppress)`` takes the place of the loss, so that gates keep one task and spoil
    the other; the spoiled loss counts up to ``ceiling``, beyond which it cannot grow.

    Args:
        role: the scores of the map: "facilitating", "interfering" or "irrelevant".
        steps: of Adam for each of the three fits; one batch each, in turn.
        rate: learning rate of the gates' logits.
        strength: of the push.
        clip: of the logits that the push sees.
        suppress: a task to spoil (contrastive form); None for the plain form.
        ceiling: of the spoiled task's loss.
        seed: of the random start.

    Example:
        >>> from polyhead import load
        >>> from polyhead.heads.tasks import task_for
        >>> model = load("all-MiniLM-L6-v2")
        >>> roles = CausalHeadGating(steps=20).roles(model, task_for(model, limit=32))
        >>> roles.facilitating.shape
        (6, 12)
    """

    role: Role = "facilitating"
    steps: int = 100
    rate: float = 0.1
    strength: float = 0.1
    clip: float = 4.0
    suppress: Task | None = None
    ceiling: float = 10.0
    seed: int = 0

    name: ClassVar[str] = "causal-head-gating"
    summary: ClassVar[str] = "gates learned on the task's loss: facilitating, interfering or irrelevant heads"
    needs: ClassVar[Needs] = "task"
    higher_means: ClassVar[str] = "the head has more of the role"

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; data is a :class:`Task`, by default of 64 examples."""
        if self.role not in get_args(Role):
            raise InputError(f"role is {self.role!r}, expected one of {', '.join(get_args(Role))}.")
        task = task_for(model, limit=64) if data is None else data
        roles = self.roles(model, task, progress=progress)
        return self._map(roles.of(self.role), model, f"{task.name}, {self.role}")

    def roles(self, model: HeadedModel, task: Task, *, progress: Progress | None = None) -> GatingRoles:
        """All fits. The model's weights are left alone, and its ``requires_grad`` marks."""
        if not isinstance(task, Task) or self.steps < 1:
            raise InputError(
                f"'{self.name}' was given {type(task).__name__} and {self.steps} steps; expected a Task, such as "
                "task_for(model), and at least one step."
            )
        start = 0.1 * torch.randn(model.layers, model.heads, generator=torch.Generator().manual_seed(self.seed))
        losses: dict[str, list[float]] = {}
        logits: dict[str, torch.Tensor] = {}
        for fit, (name, sign) in enumerate((("free", 0.0), ("keep", -1.0), ("drop", 1.0))):
            told = _scaled(progress, fit * self.steps, 3 * self.steps)
            begin = logits.get("free", start.to(model.device))
            logits[name], losses[name] = self._fit(model, task, begin, sign, told)
        return GatingRoles(_gates(model, logits["keep"]), _gates(model, logits["drop"]), losses)

    def _fit(
        self, model: HeadedModel, task: Task, begin: torch.Tensor, sign: float, progress: Progress | None
    ) -> tuple[torch.Tensor, list[float]]:
        logits = begin.clone().requires_grad_()
        optimiser = torch.optim.Adam([logits], lr=self.rate)
        keep = task.batches(model)
        spoil = self.suppress.batches(model) if self.suppress is not None else []
        losses = []
        for step in range(self.steps):
            with torch.enable_grad(), Gate(torch.sigmoid(logits)).on(model):
                batch = keep[step % len(keep)]
                loss = task.loss(task.predict(model(**batch.inputs), batch), batch).mean()
                losses.append(float(loss.detach()))
                if self.suppress is not None:
                    other = spoil[step % len(spoil)]
                    spoiled = self.suppress.loss(self.suppress.predict(model(**other.inputs), other), other)
                    loss = loss - spoiled.clamp(max=self.ceiling).mean()
                total = loss + sign * self.strength * logits.clamp(-self.clip, self.clip).mean()
            (logits.grad,) = torch.autograd.grad(total, logits)
            optimiser.step()
            if progress is not None:
                progress(step + 1, None)
        return logits.detach(), losses


def _gates(model: HeadedModel, logits: torch.Tensor) -> np.ndarray:
    gates = torch.sigmoid(logits).double().cpu().numpy()
    there = np.zeros(gates.shape, dtype=bool)
    for head in every_head(model):
        there[head] = True
    return np.where(there, gates, np.nan)


def _scaled(progress: Progress | None, done: int, total: int) -> Progress | None:
    return None if progress is None else lambda step, _: progress(done + step, total)
