"""MAPS: the function of a head read from its parameters, as a map from source tokens to the tokens it promotes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads._words import RELATIONS
from polyhead.heads.base import Progress, Score
from polyhead.heads.vocabulary import States, VocabularyView, places, single_token
from polyhead.model import HeadedModel
from polyhead.papers import paper

__all__ = ["Maps", "Operation", "RelationScore"]

Pairs = Sequence[tuple[str, str]]


class Operation(NamedTuple):
    """What a head does with one source token: how strongly it takes it up, and the tokens it promotes, best first."""

    source: str
    strength: float
    targets: list[str]


class RelationScore(NamedTuple):
    """Share of a relation's pairs whose target is among the ``k`` tokens a head promotes, and suppresses, most."""

    promote: HeadMap
    suppress: HeadMap
    pairs: list[tuple[str, str]]


@paper("maps-heads")
@dataclass
class Maps(Score):
    """Which heads carry out a relation, from weights alone (Inferring Functionality of Attention Heads, section 3).

    ``M_h = E~ W_V W_O diag(g) U^T`` maps each source token to the tokens that the head promotes; ``E~`` is the token's
    state, ``U`` the unembedding, ``g`` the gain of the final norm. The score of a head is the share of the relation's
    pairs ``(s, t)``, both single tokens, with ``t`` among the top ``k`` of row ``s``.

    Args:
        k: how many promoted tokens count.
        suppress: score ``-M_h`` instead: heads that push the target down.
        states: what ``E~`` is above layer 0: see :func:`~polyhead.heads.vocabulary.token_states`.

    Example:
        >>> model = load("gemma-3-270m")
        >>> Maps().score(model, "capital").top(3)
        >>> Maps().salient_ops(model, layer=12, head=0, among=range(5000))[0].targets
    """

    name: ClassVar[str] = "maps"
    summary: ClassVar[str] = "weights: share of a relation's word pairs that a head maps one to the other"
    needs: ClassVar[Any] = "relations"
    higher_means: ClassVar[str] = "maps sources of the relation to their targets"
    k: int = 10
    suppress: bool = False
    states: States = "both"

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; ``data`` is a name of ``RELATIONS`` or a list of word pairs, None takes "capital"."""
        found = self.relation_score(model, "capital" if data is None else data, progress=progress)
        return found.suppress if self.suppress else found.promote

    def relation_score(
        self, model: HeadedModel, pairs: str | Pairs, *, progress: Progress | None = None
    ) -> RelationScore:
        """Promotion and suppression of a relation by every head.

        Raises:
            InputError: an unknown relation, or no pair of which both words are single tokens.
        """
        name, sources, targets, kept = _tokens(model, pairs)
        view = VocabularyView(model, self.states)
        found = np.full((2, model.layers, model.heads), np.nan)
        upper, lowest = view.states(sources), view.states(sources, 0)
        for layer, at in enumerate(model.attention_layers):
            ranks = view.ranks(lowest if layer == 0 else upper, layer, torch.tensor(targets, device=model.device))
            for side in (0, 1):
                found[side, layer, : at.heads] = (ranks[side] < self.k).double().mean(0).cpu().numpy()
            if progress is not None:
                progress(layer + 1, model.layers)
        data = f"{name}, {len(kept)} pairs"
        promote = HeadMap(found[0], self.name, model.name, data, self.higher_means)
        suppress = HeadMap(found[1], f"{self.name}-suppress", model.name, data, "pushes the relation's targets down")
        return RelationScore(promote, suppress, kept)

    def salient_ops(
        self,
        model: HeadedModel,
        layer: int,
        head: int,
        *,
        n: int = 10,
        targets: int = 5,
        among: Sequence[int] | None = None,
    ) -> list[Operation]:
        """The source tokens that a head takes up most, ``||E~ W_V W_O|| / ||E~||``, and what it turns each into.

        Args:
            layer, head: of the model.
            n: source tokens.
            targets: tokens promoted by each.
            among: token ids to choose from; None for the whole vocabulary.
        """
        view = VocabularyView(model, self.states)
        ids = torch.arange(len(view.weights.require_unembedding())) if among is None else torch.as_tensor(list(among))
        states = view.states(ids, layer)
        wrote = torch.cat([view.writes(some, layer)[:, head] for some in states.split(4096)])
        strength = wrote.norm(dim=1) / states.norm(dim=1).clamp(min=1e-12)
        best = strength.topk(min(n, len(ids))).indices
        promoted = view.weights.to_logits(wrote[best]).topk(targets).indices

        def word(token: int) -> str:
            return str(model.tokenizer.decode([token]))

        return [
            Operation(word(int(ids[row])), float(strength[row]), [word(int(t)) for t in tokens])
            for row, tokens in zip(best, promoted, strict=True)
        ]

    def dynamic_score(self, model: HeadedModel, pairs: str | Pairs, template: str) -> HeadMap:
        """The same share for what heads really write at the end of prompts, to compare the static score with.

        Args:
            pairs: as in :meth:`relation_score`.
            template: of the prompts, with ``{s}`` for the source, such as "The capital of {s} is".
        """
        name, _, targets, kept = _tokens(model, pairs)
        view = VocabularyView(model, self.states)
        hits = np.full((model.layers, model.heads), np.nan)
        ranks = []
        for (source, _), target in zip(kept, targets, strict=True):
            with model.record("heads") as recording, torch.no_grad():
                model(**model.tokenize([template.format(s=source)]))
            last = recording.heads[0, :, :, -1].float()
            wrote = torch.stack(
                [
                    torch.einsum("hd,hdo->ho", z[: len(w.output)], w.output)
                    for z, w in zip(last, view._layers, strict=True)
                ]
            )
            logits = view.weights.to_logits(wrote)
            ranks.append(places(logits, torch.full(logits.shape[:-1], target, device=logits.device))[0])
        hits[:] = (torch.stack(ranks) < self.k).double().mean(0).cpu().numpy()
        return HeadMap(hits, "maps-dynamic", model.name, f"{name}, {len(kept)} prompts", self.higher_means)


def _tokens(model: HeadedModel, pairs: str | Pairs) -> tuple[str, list[int], list[int], list[tuple[str, str]]]:
    """Name, source tokens, target tokens and the pairs that are kept: those whose words are single tokens."""
    name = pairs if isinstance(pairs, str) else "pairs"
    if isinstance(pairs, str):
        if pairs not in RELATIONS:
            raise InputError(f"No relation '{pairs}'; expected one of {', '.join(RELATIONS)}, or a list of word pairs.")
        pairs = RELATIONS[pairs]
    known = single_token(model, sorted({word for pair in pairs for word in pair}))
    kept = [(first, second) for first, second in pairs if first in known and second in known]
    if not kept:
        raise InputError(
            f"None of the {len(pairs)} word pairs is made of single tokens of '{model.name}'; expected at least one."
        )
    return name, [known[first] for first, _ in kept], [known[second] for _, second in kept], kept
