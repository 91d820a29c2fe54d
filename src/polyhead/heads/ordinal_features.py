"""Features of a word's place in its order, modulo ten, that days, numbers and letters share (successor-heads)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.heads._words import ORDINALS
from polyhead.heads.vocabulary import States, VocabularyView, single_token
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Mod10Features", "Steered", "Transfer"]


class Transfer(NamedTuple):
    """How well features of the other classes tell a class's places.

    Attributes:
        share: of words whose own feature is the nearest, each class judged by the features of the others.
        null: the same with each class's places in random order, mean.
        p: share of the random orders that do as well, one at least.
        words: how many.
    """

    share: float
    null: float
    p: float
    words: int


class Steered(NamedTuple):
    """What a head gives for words of one place, before and after their feature is exchanged.

    Attributes:
        before, after: share of the words whose highest token of the class is the one after the new place.
        words: how many; both shares are NaN where there are none.
    """

    before: float
    after: float
    words: int


@paper("successor-heads")
class Mod10Features:
    """One direction for each place modulo ten: mean of ``h_t`` over the words of that place, less its class's mean.

    ``h_t`` is what the first feed-forward block writes for a word. The paper finds such features with a sparse
    autoencoder of number tokens; here they are differences of means over all classes, as few ordered words are single
    tokens. Places count from 1: Monday, January, one, first and A share a feature.

    Args:
        model: a language model, with its vocabulary matrices.
        classes: names and words of each class in order; None for :data:`~polyhead.heads._words.ORDINALS`.
        states: what stands for a token; see :func:`~polyhead.heads.vocabulary.token_states`.

    Attributes:
        vectors: ``[10, hidden]`` float32, 0 where no word has the place.

    Example:
        >>> features = Mod10Features(load("gemma-3-270m"))
        >>> features.transfer().share > features.transfer().null
        True
    """

    def __init__(
        self,
        model: HeadedModel,
        classes: Mapping[str, Sequence[str]] | None = None,
        states: States = "first-mlp",
    ) -> None:
        self.view = VocabularyView(model, states)
        self.model = model
        self._ids: dict[str, torch.Tensor] = {}
        self._places: dict[str, np.ndarray] = {}
        for name, words in (ORDINALS if classes is None else classes).items():
            known = single_token(model, words)
            kept = [place for place, word in enumerate(words, start=1) if word in known]
            if len(kept) > 1:
                self._places[name] = np.array(kept)
                self._ids[name] = torch.tensor([known[words[place - 1]] for place in kept], device=model.device)
        if len(self._ids) < 2:
            raise InputError(f"Features shared by classes need two of single tokens of '{model.name}' or more.")
        self._states = {name: self.view.states(ids).float() for name, ids in self._ids.items()}
        self.vectors = self._means(self._places)

    def transfer(self, *, shuffles: int = 500, seed: int = 0) -> Transfer:
        """Tell the places of each class by cosine with the features of the other classes."""
        random = np.random.default_rng(seed)
        hits, drawn, total = 0.0, np.zeros(shuffles), 0
        for name, places in self._places.items():
            others = self._means({other: self._places[other] for other in self._places if other != name})
            own = self._states[name] - self._states[name].mean(0)
            known = others.abs().sum(1) > 0
            cosine = torch.nn.functional.cosine_similarity(own[:, None], others[None], dim=-1)
            nearest = cosine.masked_fill(~known, -2).argmax(1).cpu().numpy()
            hits += float((nearest == places % 10).sum())
            drawn += [float((nearest == random.permutation(places) % 10).sum()) for _ in range(shuffles)]
            total += len(places)
        p = (1 + (drawn >= hits).sum()) / (1 + shuffles)
        return Transfer(hits / total, float(drawn.mean()) / total, float(p), total)

    def steer(self, head: tuple[int, int], *, minus: int, plus: int, scale: float = 1.0) -> Steered:
        """Exchange the feature ``minus`` for ``plus`` and see which word of the class the head then puts first.

        ``h - scale * f_minus + scale * f_plus`` of each word whose place is ``minus`` modulo ten; wanted is the word
        after the place that is ``plus - minus`` further on.

        Raises:
            InputError: a head the model does not have or of layer 0, which reads the embedding itself.
        """
        layer, at = head
        if not (0 < layer < self.model.layers and 0 <= at < self.model.attention_layers[layer].heads):
            raise InputError(
                f"Head {at} of layer {layer} was named; expected one of layer 1 to {self.model.layers - 1}."
            )
        if not (0 <= minus < 10 and 0 <= plus < 10):
            raise InputError(f"minus={minus}, plus={plus}; expected places modulo ten, 0 to 9.")
        change = scale * (self.vectors[plus] - self.vectors[minus])
        before = after = words = 0
        for name, places in self._places.items():
            numbers = places.tolist()
            pairs = [
                (row, numbers.index(place + plus - minus + 1))
                for row, place in enumerate(numbers)
                if place % 10 == minus and place + plus - minus > 0 and place + plus - minus + 1 in numbers
            ]
            if not pairs:
                continue
            rows, wanted = (torch.tensor(part, device=self.model.device) for part in zip(*pairs, strict=True))
            states = self._states[name][rows]
            found = [
                self.view.rows(each, layer, self._ids[name])[:, at].argmax(-1) for each in (states, states + change)
            ]
            before += int((found[0] == wanted).sum())
            after += int((found[1] == wanted).sum())
            words += len(pairs)
        return Steered(before / words, after / words, words) if words else Steered(np.nan, np.nan, 0)

    def _means(self, classes: Mapping[str, np.ndarray]) -> torch.Tensor:
        """Mean centred state of each place modulo ten over the classes given, ``[10, hidden]``."""
        rows = torch.cat([self._states[name] - self._states[name].mean(0) for name in classes])
        of = torch.tensor(np.concatenate(list(classes.values())) % 10, device=rows.device)
        total = torch.zeros(10, rows.shape[1], device=rows.device).index_add_(0, of, rows)
        return total / torch.bincount(of, minlength=10).clamp(min=1)[:, None]
