"""Model soups: one model from the average of several that were trained from the same start."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from polyhead.errors import InputError
from polyhead.papers import paper
from polyhead.training.models import trainable

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["greedy_soup", "soup"]


@paper("kalm-embedding-v2")
def soup(
    models: Sequence[str | Path | SentenceTransformer], weights: Sequence[float] | None = None
) -> SentenceTransformer:
    """The weighted mean of the models' weights (arXiv 2203.05482).

    Means are taken in float64. Models that were not trained from one start average to noise; nothing can tell that
    from the weights, so measure the soup.

    Args:
        models: folders, names or models of one architecture; they are left as they are.
        weights: of each, at least 0; None: all the same. They are divided by their sum.

    Raises:
        InputError: no models, weights that do not fit, or models that differ in their modules, vocabulary or shapes.

    Example:
        >>> from polyhead.training import soup, trainable
        >>> model = trainable("all-MiniLM-L6-v2")
        >>> soup([model, model], weights=[3, 1]).get_embedding_dimension()
        384
    """
    share = _shares(len(models), weights)
    loaded = [trainable(model) for model in models]
    first = loaded[0]
    for number, other in enumerate(loaded[1:], 1):
        _check(first, other, number)
    states = [model.state_dict() for model in loaded]
    mixed = {}
    for name, value in states[0].items():
        if value.is_floating_point():
            every = torch.stack([state[name].to(value.device, torch.float64) for state in states])
            mixed[name] = torch.tensordot(torch.tensor(share, dtype=torch.float64).to(every), every, 1).to(value.dtype)
        else:
            mixed[name] = value
    found = copy.deepcopy(first)
    found.load_state_dict(mixed)
    return found.eval()


@paper("kalm-embedding-v2")
def greedy_soup(
    models: Sequence[str | Path | SentenceTransformer], score: Callable[[SentenceTransformer], float]
) -> tuple[SentenceTransformer, list[int]]:
    """Add one model after the other, the best first, as long as the mean does not get worse.

    Args:
        models: see :func:`soup`.
        score: of a model on held-out data, higher is better. Not the data the result is reported on.

    Returns:
        The soup, and which of the models are in it, in the order they went in.
    """
    loaded = [trainable(model) for model in models]
    scores = [float(score(model)) for model in loaded]
    order = sorted(range(len(loaded)), key=lambda i: -scores[i])
    chosen, best = order[:1], scores[order[0]] if order else 0.0
    for number in order[1:]:
        value = float(score(soup([loaded[i] for i in (*chosen, number)])))
        if value >= best:
            chosen, best = [*chosen, number], value
    return soup([loaded[i] for i in chosen]), chosen


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    if not count:
        raise InputError("A soup needs at least one model.")
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count or min(given) < 0 or sum(given) <= 0:
        raise InputError(f"{count} models and weights {given}: give one weight a model, none below 0, not all 0.")
    return [weight / sum(given) for weight in given]


def _check(first: SentenceTransformer, other: SentenceTransformer, number: int) -> None:
    kinds, theirs = ([type(module).__name__ for module in model] for model in (first, other))
    if kinds != theirs:
        raise InputError(f"Model {number} is made of {theirs}, the first of {kinds}; a soup needs one architecture.")
    if first.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise InputError(f"Model {number} has another vocabulary than the first.")
    shapes, found = ({name: value.shape for name, value in model.state_dict().items()} for model in (first, other))
    if shapes != found:
        differ = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise InputError(f"Model {number} differs from the first in the shape of {', '.join(differ[:3])}.")
