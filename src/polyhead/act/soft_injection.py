"""Soft injection: a task, seen in examples once, put into heads instead of into the prompt."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import nn

from polyhead.act.vectors import Positions, VectorAction, last_logits, last_tokens, mean_heads
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.heads.base import Progress
    from polyhead.model import HeadedModel

__all__ = ["Settings", "SoftInjection", "first_answer_token", "shot_prompts", "task_embedding"]

Example = tuple[str, str]


def shot_prompts(
    examples: Sequence[Example], prompts: int, shots: int, *, template: str = "Q: {}\nA:", seed: int = 0
) -> list[str]:
    """``prompts`` texts, each with ``shots`` answered examples and one question left open, drawn at random.

    Raises:
        InputError: fewer than ``shots + 1`` examples.
    """
    if len(examples) <= shots:
        raise InputError(f"{len(examples)} examples were given; prompts of {shots} shots need at least {shots + 1}.")
    generator = random.Random(seed)
    found = []
    for _ in range(prompts):
        *shown, asked = generator.sample(list(examples), shots + 1)
        found.append("\n\n".join([f"{template.format(q)} {a}" for q, a in shown] + [template.format(asked[0])]))
    return found


@paper("soft-injection")
def task_embedding(
    model: HeadedModel, prompts: Sequence[str], *, batch_size: int = 8, progress: Progress | None = None
) -> torch.Tensor:
    """Mean output of every head at the prompts' last token, ``[layers, heads, head_dim]`` float64.

    Args:
        model: a decoder.
        prompts: with examples of the task in them, ending where the answer would begin; see :func:`shot_prompts`.
        batch_size: prompts a pass.
    """
    return mean_heads(model, prompts, positions="last", batch_size=batch_size, progress=progress)


@paper("soft-injection")
class SoftInjection(VectorAction):
    r"""At the prompt's last token, each head says in part what it says with examples: ``z <- (1-a) z + a e``.

    Args:
        embedding: ``[layers, heads, head_dim]``, of :func:`task_embedding`.
        alpha: ``[layers, heads]`` between 0 (the head's own output) and 1 (the task's), a HeadMap or a number for all.
        positions: which token; "prompt" is right for a single prompt and for prompts padded on the left.

    Example:
        >>> from polyhead.act import SoftInjection, shot_prompts, task_embedding
        >>> def teach(model, examples):
        ...     embedding = task_embedding(model, shot_prompts(examples, 50, 10))
        ...     return SoftInjection.fit(model, embedding, [(f"Q: {q}\nA:", f" {a}") for q, a in examples])
    """

    name: ClassVar[str] = "soft-injection"
    summary: ClassVar[str] = "mix a task's mean head outputs into the last token of a prompt"

    def __init__(
        self,
        embedding: np.ndarray | torch.Tensor,
        alpha: HeadMap | np.ndarray | torch.Tensor | float = 1.0,
        positions: Positions = "prompt",
    ) -> None:
        super().__init__(embedding, positions=positions)
        values = alpha.values if isinstance(alpha, HeadMap) else alpha
        self.alpha = torch.as_tensor(values, dtype=None if isinstance(values, torch.Tensor) else torch.float32)
        if self.alpha.dim() and self.alpha.shape != self.vectors.shape[:2]:
            raise InputError(
                f"alpha has the shape {list(self.alpha.shape)}, expected one number or {list(self.vectors.shape[:2])}."
            )

    def altered(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """See :class:`VectorAction`."""
        alpha = self.alpha if self.alpha.dim() == 0 else self.alpha[layer, : heads.shape[-2], None]
        alpha = alpha.to(heads.device, heads.dtype)
        return (1 - alpha) * heads + alpha * self.vector(layer, heads)

    def headmap(self, model: str = "", data: str = "") -> HeadMap:
        """The mixing weights as a map."""
        alpha = self.alpha.detach().double().cpu().expand(self.vectors.shape[:2])
        return HeadMap(alpha.numpy(), self.name, model, data, "the task takes the head over")

    @classmethod
    def fit(
        cls,
        model: HeadedModel,
        embedding: torch.Tensor,
        train: Sequence[Example],
        valid: Sequence[Example] = (),
        *,
        settings: Settings | None = None,
        progress: Progress | None = None,
    ) -> SoftInjection:
        """Learn the mixing weights: sigmoid of logits that start at 0, by cross-entropy of the first answer token.

        Args:
            model: a decoder with its language-model head (``load(..., lm_head=True)``).
            embedding: of the task.
            train: (prompt without examples, answer with its leading space) to learn from.
            valid: to choose the checkpoint by; without any the last one is kept.
            settings: of the optimisation.
        """
        settings = settings or Settings()
        logits = nn.Parameter(torch.full(embedding.shape[:2], settings.start, device=model.device))
        optimizer = torch.optim.Adam([logits], lr=settings.learning_rate)
        generator = random.Random(settings.seed)
        best, kept = float("inf"), logits.detach().clone()
        for step in range(1, settings.steps + 1):
            rows = generator.sample(list(train), min(settings.batch_size, len(train)))
            action = cls(embedding.to(model.dtype), torch.sigmoid(logits))
            loss = -first_answer_token(model, rows, action).mean()
            (logits.grad,) = torch.autograd.grad(loss, [logits])
            optimizer.step()
            if step % settings.check_every == 0 or step == settings.steps:
                now = float("-inf")
                if valid:
                    with torch.no_grad():
                        at = cls(embedding.to(model.dtype), torch.sigmoid(logits))
                        now = -float(first_answer_token(model, valid, at).mean())
                if now <= best:
                    best, kept = now, logits.detach().clone()
            if progress is not None:
                progress(step, settings.steps)
        return cls(embedding, torch.sigmoid(kept))


@dataclass(frozen=True)
class Settings:
    """How :meth:`SoftInjection.fit` learns; the paper's values, but for ``steps`` (400).

    Attributes:
        steps, batch_size: one batch a step.
        learning_rate: of Adam.
        start: of the logits; 0 is an even mix.
        check_every: steps between two looks at the validation loss.
        seed: of the batches.
    """

    steps: int = 60
    batch_size: int = 8
    learning_rate: float = 0.2
    start: float = 0.0
    check_every: int = 20
    seed: int = 0


def first_answer_token(model: HeadedModel, rows: Sequence[Example], action: VectorAction | None = None) -> torch.Tensor:
    """Log-probability ``[rows]`` of each answer's first token after its prompt, with an action at that token.

    Raises:
        InputError: the model gives no logits, or an answer has no token.
    """
    inputs = model.tokenize([prompt for prompt, _ in rows])
    last = last_tokens(inputs["attention_mask"])
    answers = [model.tokenizer(answer, add_special_tokens=False)["input_ids"] for _, answer in rows]
    if not all(answers):
        raise InputError("An answer without a token was given; answers look like ' Paris'.")
    with contextlib.nullcontext() if action is None else action.at(last).on(model):
        logits = last_logits(model, inputs)
    target = torch.tensor([answer[0] for answer in answers], device=logits.device)
    return torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
