"""Attention logits of chosen queries, taken apart: what scores of long-range attention are computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from polyhead.errors import InputError
from polyhead.tap import AttentionCall

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["query_rows", "stream_query_rows"]

RowVisitor = Callable[[int, torch.Tensor, torch.Tensor, float], None]


def query_rows(call: AttentionCall, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Queries and keys of chosen rows of one unpadded text, one key head a query head.

    Args:
        call: with a batch of one.
        rows: ``[n]`` token positions.

    Returns:
        Queries float32 ``[heads, n, head_dim]``, keys float32 ``[heads, keys, head_dim]`` (a view where heads share
        them), and the scaling: logits are ``queries @ keys.T * scaling``.

    Raises:
        InputError: a kernel that does more to the logits than scaling them (soft cap, sinks, position bias).
    """
    more = [name for name in ("softcap", "s_aux", "position_bias") if call.kwargs.get(name) is not None]
    if more:
        raise InputError(
            f"This model's attention logits are changed by {', '.join(more)}, and the score takes plain scaled dot "
            "products apart: expected a model such as Llama, Qwen or Gemma 3."
        )
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    keys = call.key[0].float()[:, None].expand(-1, heads // kv_heads, -1, -1).flatten(0, 1)
    scaling = call.kwargs.get("scaling") or call.query.shape[-1] ** -0.5
    return call.query[0][:, rows].float(), keys, float(scaling)


def stream_query_rows(model: HeadedModel, ids: Sequence[int], rows: torch.Tensor, visit: RowVisitor) -> None:
    """Run one text and call ``visit(layer, queries, keys, scaling)`` with each layer's chosen rows.

    Args:
        model: a causal decoder.
        ids: the text's tokens.
        rows, visit: see :func:`query_rows`.

    Raises:
        InputError: a model that attends in both directions.
    """
    if not all(getattr(layer.module, "is_causal", True) for layer in model.attention_layers):
        raise InputError(f"'{model.name}' attends in both directions; expected a causal decoder.")

    def watch(layer: int, call: AttentionCall) -> None:
        visit(layer, *query_rows(call, rows.to(call.query.device)))

    import inspect

    parameters = inspect.signature(model.module.forward).parameters
    few = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    with torch.inference_mode(), model.tap_attention(watch):
        model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False, **few)
