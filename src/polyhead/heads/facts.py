"""Questions whose context contradicts what a model knows: which does it follow, and through which heads?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from polyhead.act.base import Action
from polyhead.act.vectors import last_logits
from polyhead.heads.context import context_span
from polyhead.model import HeadedModel

__all__ = ["CAPITALS", "ContextQuestion", "answer_log_probs", "context_questions", "first_token"]

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Austria": "Vienna",
    "Greece": "Athens",
    "Poland": "Warsaw",
    "Portugal": "Lisbon",
    "Hungary": "Budapest",
    "Ireland": "Dublin",
    "Cuba": "Havana",
    "Canada": "Ottawa",
    "Kenya": "Nairobi",
    "Peru": "Lima",
    "Iran": "Tehran",
    "Thailand": "Bangkok",
}
_STORIES = (
    "In this story the capital of {country} is {given}. {filler}",
    "The old map was redrawn: {given} became the capital of {country}. {filler}",
    "{filler} By decree, {given} is now the capital of {country}. ",
    "A traveller writes that {given} is the capital of {country}. {filler}",
)
_FILLERS = (
    "People there trade in salt and cloth. ",
    "The winters are long and the roads are poor. ",
    "Every spring a fair is held by the river. ",
    "Its harbour is full of small boats. ",
)


@dataclass(frozen=True)
class ContextQuestion:
    """A context, a question it answers, the answer it gives and the one the model knows (with leading spaces)."""

    context: str
    question: str
    given: str
    known: str


Put = Callable[[Sequence[ContextQuestion], torch.Tensor], Action]


def context_questions(n: int, seed: int = 0) -> list[ContextQuestion]:
    """``n`` questions about capitals, each with a context that names another city.

    Made from a list of capitals and a few sentences; every ``n`` and ``seed`` gives the same.
    """
    generator = np.random.default_rng(seed)
    countries = list(CAPITALS)
    found = []
    for _ in range(n):
        country, other = generator.choice(countries, 2, replace=False)
        given, known = CAPITALS[other], CAPITALS[country]
        story = _STORIES[generator.integers(len(_STORIES))]
        filler = _FILLERS[generator.integers(len(_FILLERS))]
        context = story.format(country=country, given=given, filler=filler)
        found.append(ContextQuestion(context, f"The capital of {country} is", f" {given}", f" {known}"))
    return found


def answer_log_probs(
    model: HeadedModel, questions: Sequence[ContextQuestion], put: Put | None = None, batch_size: int = 8
) -> np.ndarray:
    """Log-probabilities of both answers' first tokens with the context, ``[n, 2]``: the given one and the known one.

    Args:
        model: a decoder with its language-model head.
        questions: what is asked.
        put: ``put(questions, span)`` gives the action for a batch; ``span`` is boolean ``[batch, tokens]``, the tokens
            of the contexts. None for the model as it is.
        batch_size: questions a pass.
    """
    found = []
    for first in range(0, len(questions), batch_size):
        batch = questions[first : first + batch_size]
        inputs = model.tokenize([each.context + each.question for each in batch])
        spans = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
        for row, each in enumerate(batch):
            start, end = context_span(model, each.context, each.question)
            shift = int(inputs["attention_mask"][row].argmax())  # padding on the left
            spans[row, start + shift : end + shift] = True
        with put(batch, spans).on(model) if put else nullcontext(), torch.inference_mode():
            log_p = torch.log_softmax(last_logits(model, inputs), -1)
        answers = [[first_token(model, word) for word in (each.given, each.known)] for each in batch]
        found.append(log_p.gather(1, torch.tensor(answers, device=log_p.device)).double().cpu().numpy())
    return np.concatenate(found)


def first_token(model: HeadedModel, answer: str) -> int:
    """Id of an answer's first token, the answer given with its leading space."""
    return int(model.tokenizer(answer, add_special_tokens=False)["input_ids"][0])
