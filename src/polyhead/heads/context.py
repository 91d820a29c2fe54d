"""Which heads respond to a context, and which look at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from polyhead.act.attention import Span, span_mask
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Needs, Progress, Score
from polyhead.papers import paper
from polyhead.tap import AttentionCall, attention_weights

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["ContextAttention", "ContextDivergence"]


Inputs = Mapping[str, torch.Tensor]


def _pairs(data: Any, what: str, inputs: str) -> list[tuple[Any, Any]]:
    if not isinstance(data, Sequence) or not data or not all(len(pair) == 2 for pair in data):
        raise InputError(
            f"{what} needs a list of (context, question): the same question is run with and without it. For a context "
            f"that is no text, such as an image: a list of {inputs}."
        )
    return list(data)


def _size(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))


@paper("vhd-vhr")
@dataclass
class ContextDivergence(Score):
    """Distance between a head's output at the last token with a context before the question and without it.

    The counterfactual score of vhd-vhr, a mean over questions. Where the context is an image, as it is there, the data
    are pairs of inputs, with the image and without, whose rows are prompts padded on the left.

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
        """See :class:`Score`; data are pairs of (context, question), or of (inputs with context, inputs without)."""
        pairs = _pairs(data, "context-divergence", "(inputs with it, inputs without it)")
        if self.distance not in ("l2", "relative", "cosine"):
            raise InputError(f"distance is {self.distance!r}, expected 'l2', 'relative' or 'cosine'.")
        total, count = torch.zeros(model.layers, model.heads, dtype=torch.float64), 0
        for done, (context, question) in enumerate(pairs, start=1):
            if isinstance(context, str):
                total, count = total + self.one(model, context, question), count + 1
            else:
                found = self.between(model, context, question)
                total, count = total + found.sum(0), count + len(found)
            if progress is not None:
                progress(done, len(pairs))
        return self._map(total / count, model, f"{count} questions")

    def one(self, model: HeadedModel, context: str, question: str) -> torch.Tensor:
        """The divergence of each head for one question, ``[layers, heads]`` float64."""
        return self.between(model, model.tokenize([context + question]), model.tokenize([question]))[0]

    def between(self, model: HeadedModel, given: Inputs, without: Inputs) -> torch.Tensor:
        """The divergence at each row's last token between two inputs, ``[rows, layers, heads]`` float64."""
        one, other = _last_heads(model, given), _last_heads(model, without)
        if self.distance == "cosine":
            return 1 - torch.nn.functional.cosine_similarity(one, other, dim=-1)
        found = (one - other).norm(dim=-1)
        return found / other.norm(dim=-1).clamp(min=1e-30) if self.distance == "relative" else found


def _last_heads(model: HeadedModel, inputs: Inputs) -> torch.Tensor:
    """Head outputs at each row's last token, ``[rows, layers, heads, head_dim]`` float64."""
    last = torch.zeros(_size(inputs), model.layers, model.heads, model.head_dim, dtype=torch.float64)

    def keep(layer: int, z: torch.Tensor) -> None:
        last[:, layer, : z.shape[-2], : z.shape[-1]] = z[:, -1].double().cpu()

    with model.tap_heads(keep), torch.inference_mode():
        model(**inputs)
    return last


@paper("paint-lvlm")
@dataclass
class ContextAttention(Score):
    """Share of a head's attention, at the last token, that falls on a context before the question.

    The sensitivity by which paint-lvlm chooses heads. Where the context is an image, as it is there, the data are pairs
    of inputs, their rows padded on the left, and the span of the image's tokens in them.

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
        """See :class:`Score`; data are pairs of (context, question), or of (inputs, span)."""
        pairs = _pairs(data, "context-attention", "(inputs, span of the image's tokens)")
        total, count = torch.zeros(model.layers, model.heads, dtype=torch.float64), 0
        for done, (context, question) in enumerate(pairs, start=1):
            inputs, span = context, question
            if isinstance(context, str):
                inputs, span = model.tokenize([context + question]), context_span(model, context, question)

            def add(layer: int, call: AttentionCall, span: Span = span) -> None:
                weights = attention_weights(call)[:, :, -1]
                # In a layer with a sliding window all keys are there; masked ones have the weight 0.
                inside = weights.double() * span_mask(span, weights)[:, None]
                total[layer, : weights.shape[1]] += inside.sum((0, -1)).cpu()

            with model.tap_attention(add), torch.inference_mode():
                model(**inputs)
            count += _size(inputs)
            if progress is not None:
                progress(done, len(pairs))
        return self._map(total / count, model, f"{count} questions")


def context_span(model: HeadedModel, context: str, question: str) -> tuple[int, int]:
    """First token and end of ``context`` in the tokens of ``context + question``."""
    found = model.tokenizer(context + question, return_offsets_mapping=True)
    inside = [
        at for at, (start, stop) in enumerate(found["offset_mapping"]) if start < stop and start < len(context.rstrip())
    ]
    if not inside:
        raise InputError("A context without a token was given; expected text.")
    return inside[0], inside[-1] + 1
