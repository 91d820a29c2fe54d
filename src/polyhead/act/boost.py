"""PAINT: raise the attention scores of chosen tokens in the heads that look at them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch

from polyhead.act.attention import Span, span_mask
from polyhead.act.base import Action
from polyhead.act.vectors import Heads, head_mask
from polyhead.errors import InputError
from polyhead.papers import paper
from polyhead.tap import AttentionCall, additive_mask

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["AttentionBoost", "select_tokens"]


@paper("paint-lvlm")
class AttentionBoost(Action):
    """Scores of the tokens in each group rise before the softmax: ``s <- s + strength |s|``; rows still sum to 1.

    Args:
        groups: spans of tokens (see :func:`span_mask`), such as local and summary image tokens, or a passage. Where
            groups overlap their strengths add.
        strengths: one a group; 0 changes nothing.
        heads: which heads; None for all. ``ContextAttention`` and ``ContextDivergence`` find those that look at or
            respond to a context.

    Example:
        >>> import polyhead, torch
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> with AttentionBoost([(1, 4)], [0.5], heads=[(2, 1)]).on(model), torch.no_grad():
        ...     _ = model(**model.tokenize(["the passage matters more"]))
    """

    name: ClassVar[str] = "boost"
    summary: ClassVar[str] = "raise the attention scores of chosen tokens"

    def __init__(self, groups: Sequence[Span], strengths: Sequence[float], heads: Heads = None) -> None:
        if len(groups) != len(strengths):
            raise InputError(f"{len(groups)} groups and {len(strengths)} strengths were given; expected one for each.")
        self.groups, self.strengths = list(groups), list(strengths)
        self.heads = heads if heads is None or hasattr(heads, "shape") else list(heads)

    @contextmanager
    def on(self, model: HeadedModel) -> Iterator[None]:
        """See :class:`Action`.

        Raises:
            UnreadableModelError: the model does not attend through transformers' attention interface.
        """
        chosen = head_mask(self.heads, model.layers, model.heads)
        layers = [layer for layer in range(model.layers) if bool(chosen[layer].any())]

        def prepare(layer: int, call: AttentionCall) -> AttentionCall | None:
            if not any(self.strengths):
                return None
            scores = _scores(call).abs()
            raised = torch.zeros_like(scores)
            for span, strength in zip(self.groups, self.strengths, strict=True):
                raised = raised + strength * scores * span_mask(span, scores)[:, None, None]
            heads = chosen[layer, : scores.shape[1]].to(scores.device)
            raised = raised * heads[:, None, None]
            mask = additive_mask(call)
            # Masked places stay masked: the lowest number plus a raise is no number of its own kind of low.
            total = raised if mask is None else torch.where(mask < -1e4, mask.expand_as(raised), mask + raised)
            return replace(call, mask=total.to(call.query.dtype))

        with model.tap_attention(prepare=prepare, layers=layers):
            yield


def _scores(call: AttentionCall) -> torch.Tensor:
    """Scores ``[batch, heads, tokens, keys]`` before the softmax, without mask, capped where the model caps them."""
    groups = call.query.shape[1] // call.key.shape[1]
    key = call.key.repeat_interleave(groups, dim=1)
    scaling = call.kwargs.get("scaling")
    scores = call.query @ key.transpose(-1, -2) * (call.query.shape[-1] ** -0.5 if scaling is None else scaling)
    cap = call.kwargs.get("softcap")
    return torch.tanh(scores / cap) * cap if cap else scores


@paper("paint-lvlm")
def select_tokens(
    local: torch.Tensor, deep: torch.Tensor, local_k: int, summary_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two groups of image tokens from the vision encoder's attention: locally informative ones, and summaries.

    Args:
        local: ``[batch, tokens]`` attention that each token receives in a shallow layer of the encoder.
        deep: the same in a deep layer, where a few tokens with outstanding attention hold the summary of the image.
        local_k, summary_k: how many of each.

    Returns:
        Two boolean masks ``[batch, tokens]``; a token that is a summary is not local as well.
    """
    tokens = local.shape[-1]
    if local_k + summary_k > tokens:
        raise InputError(f"{local_k} local and {summary_k} summary tokens were asked for; there are {tokens}.")
    summary = torch.zeros_like(deep, dtype=torch.bool).scatter(-1, deep.topk(summary_k).indices, True)
    rest = local.masked_fill(summary, float("-inf"))
    return torch.zeros_like(summary).scatter(-1, rest.topk(local_k).indices, True), summary
