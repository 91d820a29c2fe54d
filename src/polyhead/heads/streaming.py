"""Attention weights of a pass, one layer at a time: what scores of attention patterns are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from polyhead.errors import InputError
from polyhead.tap import AttentionCall, attention_weights

if TYPE_CHECKING:
    from polyhead.heads.base import Progress
    from polyhead.model import HeadedModel

__all__ = ["Pattern", "check_texts", "stream_attention", "text_batches"]


@dataclass(frozen=True)
class Pattern:
    """One layer's attention in one batch.

    Attributes:
        layer: which.
        weights: float32 ``[batch, heads, queries, keys]``.
        allowed: boolean ``[batch, 1, queries, keys]``, True where the query may look and both are no padding.
    """

    layer: int
    weights: torch.Tensor
    allowed: torch.Tensor


def stream_attention(model: HeadedModel, inputs: dict[str, torch.Tensor], visit: Callable[[Pattern], None]) -> None:
    """Run ``model(**inputs)`` and call ``visit`` with each layer's attention; never are two layers' held at once.

    Models that attend without transformers' attention interface (MPNet) are run once a layer.

    Args:
        model: any.
        inputs: of one batch; ``attention_mask`` ``[batch, tokens]`` says what is padding.
        visit: told the layers in order.
    """
    mask = inputs.get("attention_mask")
    with torch.inference_mode():
        if all(layer.uses_interface for layer in model.attention_layers):

            def watch(layer: int, call: AttentionCall) -> None:
                visit(Pattern(layer, attention_weights(call).float()[..., : call.key.shape[2]], _allowed(call, mask)))

            with model.tap_attention(watch):
                model(**inputs)
            return
        for layer in range(model.layers):
            with model.record("attention", layers=[layer]) as recording:
                model(**inputs)
            weights = recording.layer_attention(layer).float()
            allowed = weights.new_ones(weights.shape[0], 1, *weights.shape[2:], dtype=torch.bool)
            allowed = _without_padding(allowed, mask)  # rows of padding may look anywhere and say nothing
            if float((weights * allowed).triu(1).max()) == 0:
                allowed = allowed.tril()
            visit(Pattern(layer, weights, allowed))


def _allowed(call: AttentionCall, padding: torch.Tensor | None) -> torch.Tensor:
    batch, _, queries, _ = call.query.shape
    keys = call.key.shape[2]
    allowed = call.query.new_ones(batch, 1, queries, keys, dtype=torch.bool)
    if call.mask is not None:
        mask = call.mask[..., :keys]
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        allowed = allowed & seen[:, :1]
    else:
        causal = call.kwargs.get("is_causal")
        if causal is None:
            causal = getattr(call.module, "is_causal", False)
        if causal and queries > 1:
            allowed = allowed.tril(keys - queries)
    return _without_padding(allowed, padding)


def _without_padding(allowed: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    if padding is None or padding.dim() != 2 or padding.shape[1] != allowed.shape[-1]:
        return allowed
    real = padding.bool()
    return allowed & real[:, None, None, :] & real[:, None, :, None]


def check_texts(data: Any, score: str) -> list[str]:
    """The texts given to a score.

    Raises:
        InputError: anything but a list of texts.
    """
    if isinstance(data, str) or not isinstance(data, Sequence) or not data or not isinstance(data[0], str):
        raise InputError(f"{score} was given {type(data).__name__}; expected a list of at least one text.")
    return list(data)


def text_batches(
    model: HeadedModel, texts: Sequence[str], batch_size: int, max_tokens: int, progress: Progress | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of texts, cut at ``max_tokens``."""
    for first in range(0, len(texts), batch_size):
        yield model.tokenize(texts[first : first + batch_size], truncation=True, max_length=max_tokens)
        if progress is not None:
            progress(min(first + batch_size, len(texts)), len(texts))
