"""Successor heads: heads whose output circuit turns Monday into Tuesday and two into three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads._words import ORDINALS
from polyhead.heads.base import Progress, Score
from polyhead.heads.vocabulary import States, VocabularyView, single_token
from polyhead.model import HeadedModel
from polyhead.papers import paper

__all__ = ["Succession", "SuccessorScore"]

_ROUND = ("days", "months")


class Succession(NamedTuple):
    """Succession scores with what chance gives.

    Attributes:
        map: share of tokens whose successor is the head's highest token of the class.
        null: mean of the same with the successors of each class in random order, ``[layers, heads]``.
        p: share of shuffles that score as high or higher, one at least, ``[layers, heads]``.
        tokens: how many.
    """

    map: HeadMap
    null: np.ndarray
    p: np.ndarray
    tokens: int


@paper("successor-heads")
@dataclass
class SuccessorScore(Score):
    """Share of ordered tokens that a head maps to their successor, from weights alone (Successor Heads, section 3).

    For a token ``t`` of a class such as the days, ``logits = h_t W_V W_O diag(g) U^T`` with ``h_t`` what the first
    feed-forward block writes for it; a hit is a successor that scores highest among the tokens of the class.

    Args:
        classes: names and words of each class in order; those that are no single token are left out, with the pairs
            they are part of. None for :data:`~polyhead.heads._words.ORDINALS`.
        states: what stands for a token; see :func:`~polyhead.heads.vocabulary.token_states`.

    Example:
        >>> SuccessorScore().score(load("gemma-3-270m")).top(3)
    """

    name: ClassVar[str] = "successor"
    summary: ClassVar[str] = "weights: share of days, months, numbers, letters that a head maps to the next one"
    needs: ClassVar[Any] = "weights"
    higher_means: ClassVar[str] = "turns an ordered token into the one that follows it"
    classes: Mapping[str, Sequence[str]] | None = field(default=None)
    states: States = "first-mlp"

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`."""
        return self._map(self._shares(model, progress)[0], model)

    def with_null(self, model: HeadedModel, *, shuffles: int = 200, seed: int = 0) -> Succession:
        """The score beside that of shuffled successors: what a head gets that maps tokens of a class anyhow."""
        values, choices, follows = self._shares(model, None)
        generator = np.random.default_rng(seed)
        drawn = np.zeros((shuffles, *values.shape))
        for row in range(shuffles):
            hits = np.concatenate(
                [
                    chosen == generator.permutation(after)[:, None, None]
                    for chosen, after in zip(choices, follows, strict=True)
                ]
            )
            drawn[row] = hits.mean(0)
        p = (1 + (drawn >= values).sum(0)) / (1 + shuffles)
        return Succession(self._map(values, model), drawn.mean(0), p, sum(len(after) for after in follows))

    def _shares(
        self, model: HeadedModel, progress: Progress | None
    ) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """Shares ``[layers, heads]``; per class the place chosen ``[tokens, layers, heads]``, and the right one."""
        classes = ORDINALS if self.classes is None else self.classes
        view = VocabularyView(model, self.states)
        choices, follows = [], []
        for done, (name, words) in enumerate(classes.items(), start=1):
            known = single_token(model, words)
            ids = torch.tensor([known[word] for word in words if word in known], device=model.device)
            pairs = _successors(name, words, known)
            if len(pairs) < 2:
                continue
            first = torch.tensor([pair[0] for pair in pairs], device=model.device)
            upper, lowest = view.states(ids[first]), view.states(ids[first], 0)
            best = np.full((len(pairs), model.layers, model.heads), -1)
            for layer, at in enumerate(model.attention_layers):
                logits = view.rows(lowest if layer == 0 else upper, layer, ids)
                highest, next_one = logits.topk(2).values.unbind(-1)
                clear = highest - next_one > 1e-5 * logits.abs().amax(-1)  # a tie names no successor
                best[:, layer, : at.heads] = torch.where(clear, logits.argmax(-1), -1).cpu().numpy()
            choices.append(best)
            follows.append(np.array([pair[1] for pair in pairs]))
            if progress is not None:
                progress(done, len(classes))
        if not choices:
            raise InputError(
                f"No class has three words in a row that are single tokens of '{model.name}'; expected one at least."
            )
        hits = [chosen == after[:, None, None] for chosen, after in zip(choices, follows, strict=True)]
        return np.concatenate(hits).mean(0), choices, follows


def _successors(name: str, words: Sequence[str], known: Mapping[str, int]) -> list[tuple[int, int]]:
    """Places, among the words that are single tokens, of each word and the one after it."""
    kept = [word for word in words if word in known]
    after = list(pairwise(words))
    if name in _ROUND:
        after.append((words[-1], words[0]))
    return [(kept.index(a), kept.index(b)) for a, b in after if a in known and b in known]
