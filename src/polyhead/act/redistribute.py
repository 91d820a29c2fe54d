"""Take attention from sink tokens and give it to the part of the input that a question is about."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from polyhead.act.attention import AttentionAction, Run, Span, span_mask
from polyhead.act.vectors import Heads, batches_of
from polyhead.errors import InputError
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["RedistributeAttention", "massiveness", "sink_dimensions", "sink_tokens"]


@paper("visual-attention-sink")
def massiveness(states: torch.Tensor, dimensions: Sequence[int]) -> torch.Tensor:
    """``max_d |x_d| / RMS(x)`` over the given dimensions, ``[...]`` of states ``[..., hidden]``."""
    states = states.float()
    size = states.pow(2).mean(-1).sqrt().clamp(min=1e-20)
    return states[..., list(dimensions)].abs().amax(-1) / size


@paper("visual-attention-sink")
def sink_tokens(states: torch.Tensor, dimensions: Sequence[int], tau: float = 20.0) -> torch.Tensor:
    """Boolean ``[...]``: tokens whose :func:`massiveness` reaches ``tau``."""
    return massiveness(states, dimensions) >= tau


@paper("visual-attention-sink")
def sink_dimensions(
    model: HeadedModel, texts: Sequence[str] | Mapping[str, torch.Tensor], count: int = 2, *, batch_size: int = 8
) -> list[int]:
    """The dimensions of the residual stream that are massive in a few tokens, but not in most, over texts and layers.

    For each dimension and layer, the largest ``|x_d| / RMS(x)`` over a text's tokens less the median over them; the
    largest of the layers is averaged over texts, and the ``count`` highest dimensions are given. The median is taken
    off since some models (Gemma) carry a dimension that is massive in every token, which marks none. What enters the
    first layer and what leaves the last is not looked at.

    Args:
        model: a decoder, with or without images.
        texts: what is looked at; or, where it is more than text, one batch of the model's inputs.
        count: how many dimensions.
        batch_size: texts a pass.
    """
    batches = [dict(texts)] if isinstance(texts, Mapping) else batches_of(model, texts, batch_size)
    total = torch.zeros(model.hidden_size, dtype=torch.float64, device=model.device)
    for inputs in batches:
        with model.record("tokens") as recording, torch.inference_mode():
            model(**inputs)
        states = recording.tokens[:, 1:-1].float()
        relative = states.abs() / states.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-20)
        if "attention_mask" in inputs:
            relative = relative.masked_fill(~inputs["attention_mask"].bool()[:, None, :, None], float("nan"))
        highest = relative.nan_to_num(nan=0.0).amax(2)
        total += (highest - relative.nanmedian(2).values).amax(1).double().sum(0)
    found: list[int] = total.topk(count).indices.tolist()
    return found


@paper("visual-attention-sink")
class RedistributeAttention(AttentionAction):
    """In heads that look at a span, sinks hand a share of their attention to the span's other tokens.

    For every query and head: where the span has at least ``least`` of the attention, and at least ``rho`` of that lies
    on tokens that are no sinks, a share ``p`` of the attention on sinks (anywhere) goes to the span's tokens that are
    no sinks, in proportion to what they have. Rows keep their sum; the last layer is left alone.

    Args:
        span: tokens of the image, the passage, ...; see :func:`span_mask`.
        dimensions: of :func:`sink_dimensions`.
        p, rho, least, tau: as above; ``tau`` of :func:`sink_tokens`. ``p=0`` changes nothing, ``rho=least=0`` treats
            every head.
        heads: which heads may be treated; None for all.

    Example:
        >>> import polyhead, torch
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> action = RedistributeAttention((1, 5), sink_dimensions(model, ["a few texts"]))
        >>> with action.on(model), torch.no_grad():
        ...     _ = model(**model.tokenize(["the passage comes first, then a question"]))
    """

    name: ClassVar[str] = "redistribute"
    summary: ClassVar[str] = "give attention of sink tokens to a span of the input"
    needs_states = True

    def __init__(
        self,
        span: Span,
        dimensions: Sequence[int],
        p: float = 0.6,
        rho: float = 0.8,
        least: float = 0.2,
        tau: float = 20.0,
        heads: Heads = None,
    ) -> None:
        super().__init__(heads)
        if not 0 <= p <= 1:
            raise InputError(f"p is {p}, expected the share of a sink's attention to hand on, 0 to 1.")
        self.span, self.dimensions = span, list(dimensions)
        self.p, self.rho, self.least, self.tau = p, rho, least, tau

    def sinks(self, states: torch.Tensor) -> torch.Tensor:
        """Which tokens of one layer's states ``[batch, tokens, hidden]`` are sinks: boolean ``[batch, tokens]``."""
        return sink_tokens(states, self.dimensions, self.tau)

    def reweigh(self, layer: int, weights: torch.Tensor, run: Run) -> torch.Tensor | None:
        """See :class:`AttentionAction`."""
        assert run.states is not None
        states = run.states._tokens
        keys = weights.shape[-1]
        now = self.sinks(states[layer])
        if weights.shape[-2] < keys:  # a step of a generation: earlier tokens are in the cache
            now = torch.cat([run.kept[layer], now], 1) if layer in run.kept else now
        run.kept[layer] = now
        if self.p == 0 or layer == run.layers - 1:
            return None
        sinks = now[:, None, None, -keys:]
        span = span_mask(self.span, weights)[:, None, None]
        return redistribute(weights, sinks, span, self.p, self.rho, self.least)


def redistribute(
    weights: torch.Tensor, sinks: torch.Tensor, span: torch.Tensor, p: float, rho: float, least: float
) -> torch.Tensor:
    """The change of :class:`RedistributeAttention` to weights ``[batch, heads, tokens, keys]``.

    Args:
        weights: as above.
        sinks, span: boolean, ``[batch or 1, 1, 1, keys]``.
        p, rho, least: of the class.
    """
    inside = (weights * span).sum(-1, keepdim=True)
    takers = weights * (span & ~sinks)
    total = takers.sum(-1, keepdim=True)
    treated = (inside >= least) & (total >= rho * inside) & (total > 0)
    freed = p * weights * sinks
    share = takers / total.clamp(min=1e-20)
    return torch.where(treated, weights - freed + share * freed.sum(-1, keepdim=True), weights)
