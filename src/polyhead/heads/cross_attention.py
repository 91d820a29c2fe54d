"""The heads of cross-attention: how an encoder-decoder's decoder looks at what the encoder read (hrv)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from polyhead.act.rescale import RescaleAttention
from polyhead.errors import InputError
from polyhead.model import HeadedModel
from polyhead.papers import paper
from polyhead.structure import probe_inputs

if TYPE_CHECKING:
    from polyhead.act.attention import Span
    from polyhead.tap import AttentionCall

__all__ = ["cross_attention", "ordered_weakening"]


@paper("hrv")
def cross_attention(module: nn.Module, name: str | None = None) -> HeadedModel:
    """An encoder-decoder seen by its cross-attention: layers and heads are those in which the decoder looks back.

    Called with the encoder's and the decoder's inputs. Scores and actions on heads and on attention work as on any
    model; queries are the decoder's tokens, keys the encoder's.

    Args:
        module: a whole encoder-decoder that attends through transformers' attention interface (BART, T5, Whisper).
        name: for maps.

    Raises:
        InputError: a model without cross-attention.

    Example:
        >>> from transformers import BartConfig, BartModel
        >>> config = BartConfig(d_model=32, encoder_layers=1, decoder_layers=2, decoder_attention_heads=4)
        >>> cross_attention(BartModel(config)).attention_layers[1].path
        'decoder.layers.1.encoder_attn'
    """
    model = HeadedModel(module, name=name)
    crossing: set[int] = set()

    def watch(layer: int, call: AttentionCall) -> None:
        if call.key.shape[2] != call.query.shape[2]:
            crossing.add(layer)

    known = [layer.index for layer in model.attention_layers if layer.uses_interface]
    with torch.no_grad(), model.tap_attention(watch, layers=known):
        module(**probe_inputs(module))  # the decoder is given fewer tokens than the encoder
    if not crossing:
        raise InputError(
            f"'{model.name}' has no cross-attention that can be seen: expected a whole encoder-decoder, such as "
            "BartModel, T5Model or WhisperModel; for one stack use load."
        )
    chosen = [layer for layer in model.attention_layers if layer.index in crossing]
    model.attention_layers = tuple(replace(layer, index=index) for index, layer in enumerate(chosen))
    model.layers = len(chosen)
    model.heads = max(layer.heads for layer in chosen)
    model.kv_heads = max(layer.kv_heads for layer in chosen)
    model.head_dim = max(layer.head_dim for layer in chosen)
    return model


@paper("hrv")
def ordered_weakening(
    model: HeadedModel,
    order: Iterable[tuple[int, int]],
    span: Span,
    metric: Callable[[], float],
    factor: float = -2.0,
) -> np.ndarray:
    """What is left of a concept as heads are weakened one after the other: ``[heads of the order + 1]``.

    Args:
        model: as for :class:`~polyhead.act.rescale.RescaleAttention`.
        order: ``(layer, head)``, such as ``relevance.top(1.0)``, most relevant first.
        span: the concept's tokens among the keys.
        metric: runs the model and measures the concept; called with none weakened, then after each head.
        factor: of the attention on the span in weakened heads; -2 in the paper.
    """
    factors = np.ones((model.layers, model.heads))
    left = [metric()]
    for layer, head in order:
        factors[layer, head] = factor
        with RescaleAttention(span, factors).on(model):
            left.append(metric())
    return np.array(left)
