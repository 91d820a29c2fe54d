"""Which heads respond to a context, and which look at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Needs, Progress, Score
from polyhead.papers import paper
from polyhead.tap import AttentionCall, attention_weights

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["ContextAttention", "ContextDivergence"]


def _pairs(data: Any, what: str) -> list[tuple[str, str]]:
    if not isinstance(data, Sequence) or not data or not all(len(pair) == 2 for pair in data):
        raise InputError(f"{what} needs a list of (context, question): the same question is run with and without it.")
    return [(str(context), str(question)) for context, question in data]


@paper("vhd-vhr")
@dataclass
class ContextDivergence(Score):
    """Distance between a head's output at the last token with a context before the question and without it.

    The counterfactual score of vhd-vhr (there the context is an image), a mean over questions.

    Args:
        distance: "l2"; "relative" divides it by the norm without context; "cosine" is 1 less the cosine.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> data = [("The door is red. ", "What colour is the door?"), ("Ann left. ", "Who left?")]
        >>> ContextDivergence().score(model, data).shape
        (6, 12)
    """

    name: ClassVar[str] = "context-divergence"
    summary: ClassVar[str] = "how much a head's output changes with a context before the question"
    needs: ClassVar[Needs] = "other"
    higher_means: ClassVar[str] = "responds to the context"
    distance: Literal["l2", "relative", "cosine"] = "l2"

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; data are pairs of (context, question)."""
        pairs = _pairs(data, "context-divergence")
        if self.distance not in ("l2", "relative", "cosine"):
            raise InputError(f"distance is {self.distance!r}, expected 'l2', 'relative' or 'cosine'.")
        total = torch.zeros(model.layers, model.heads, dtype=torch.float64)
        for done, (context, question) in enumerate(pairs, start=1):
            total += self.one(model, context, question)
            if progress is not None:
                progress(done, len(pairs))
        return self._map(total / len(pairs), model, f"{len(pairs)} questions")

    def one(self, model: HeadedModel, context: str, question: str) -> torch.Tensor:
        """The divergence of each head for one question, ``[layers, heads]`` float64."""
        runs = []
        for text in (context + question, question):
            last = torch.zeros(model.layers, model.heads, model.head_dim, dtype=torch.float64)

            def keep(layer: int, z: torch.Tensor, last: torch.Tensor = last) -> None:
                last[layer, : z.shape[-2], : z.shape[-1]] = z[0, -1].double().cpu()

            with model.tap_heads(keep), torch.inference_mode():
                model(**model.tokenize([text]))
            runs.append(last)
        given, without = runs
        if self.distance == "cosine":
            return 1 - torch.nn.functional.cosine_similarity(given, without, dim=-1)
        found = (given - without).norm(dim=-1)
        return found / without.norm(dim=-1).clamp(min=1e-30) if self.distance == "relative" else found


@paper("paint-lvlm")
@dataclass
class ContextAttention(Score):
    """Share of a head's attention, at the last token, that falls on a context before the question.

    The sensitivity by which paint-lvlm chooses heads (there the context is an image).

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> ContextAttention().score(model, [("The door is red. ", "What colour is the door?")]).shape
        (6, 12)
    """

    name: ClassVar[str] = "context-attention"
    summary: ClassVar[str] = "share of the last token's attention on a context before the question"
    needs: ClassVar[Needs] = "other"
    higher_means: ClassVar[str] = "looks at the context"

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; data are pairs of (context, question)."""
        pairs = _pairs(data, "context-attention")
        total = torch.zeros(model.layers, model.heads, dtype=torch.float64)
        for done, (context, question) in enumerate(pairs, start=1):
            first, end = context_span(model, context, question)

            def add(layer: int, call: AttentionCall, first: int = first, end: int = end) -> None:
                weights = attention_weights(call)[0, :, -1]
                # In a layer with a sliding window all keys are there; masked ones have the weight 0.
                total[layer, : len(weights)] += weights[:, first:end].double().sum(-1).cpu()

            with model.tap_attention(add), torch.inference_mode():
                model(**model.tokenize([context + question]))
            if progress is not None:
                progress(done, len(pairs))
        return self._map(total / len(pairs), model, f"{len(pairs)} questions")


def context_span(model: HeadedModel, context: str, question: str) -> tuple[int, int]:
    """First token and end of ``context`` in the tokens of ``context + question``."""
    found = model.tokenizer(context + question, return_offsets_mapping=True)
    inside = [
        at for at, (start, stop) in enumerate(found["offset_mapping"]) if start < stop and start < len(context.rstrip())
    ]
    if not inside:
        raise InputError("A context without a token was given; expected text.")
    return inside[0], inside[-1] + 1
