"""The contract of a cache policy, and the cache it builds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from polyhead.cache.storage import HeadCacheLayer, Look
from polyhead.errors import InputError, UnreadableModelError

if TYPE_CHECKING:
    from polyhead.headmap import HeadMap
    from polyhead.model import HeadedModel

__all__ = ["CachePolicy", "HeadCache", "kv_scores"]

Budgets = list[list[int | None]]
_NAME = "polyhead_cache"


class CachePolicy(ABC):
    """How many tokens each key-value head keeps, and which.

    A policy gives ``budgets`` and ``priority``. Layers with a sliding window of the model's own keep their own rule.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    once: ClassVar[bool] = False
    """Whether tokens are dropped after the first pass only."""

    @property
    def compensates(self) -> bool:
        """Whether one token stands for all that were dropped."""
        return False

    @abstractmethod
    def budgets(self, model: HeadedModel) -> Budgets:
        """``[layers][kv_heads]`` tokens to keep, None for all."""

    @abstractmethod
    def priority(self, look: Look) -> torch.Tensor:
        """``[batch, heads, kept tokens]``, higher for tokens that should stay."""

    def cache(self, model: HeadedModel) -> HeadCache:
        """A fresh cache for one batch of texts; used inside :meth:`on`.

        Raises:
            InputError: budgets of another shape than the model.
        """
        budgets = self.budgets(model)
        counts = [layer.kv_heads for layer in model.attention_layers]
        if [len(row) for row in budgets] != counts:
            raise InputError(
                f"Budgets for {[len(row) for row in budgets]} key-value heads a layer were given; '{model.name}' has "
                f"{counts}."
            )
        layers = list(DynamicCache(config=model.config).layers) or [DynamicLayer() for _ in counts]
        for at, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                layers[at] = HeadCacheLayer(self, at, budgets[at])
        return HeadCache(layers)

    @contextmanager
    def on(self, model: HeadedModel) -> Iterator[HeadCache]:
        """Let ``model`` attend through this policy's cache while the block runs.

        Yields a fresh cache for ``model.module.generate(..., past_key_values=cache)`` or a forward pass;
        ``cache.reset()`` makes it fit for the next text.

        Raises:
            UnreadableModelError: the model does not attend through transformers' attention interface.
        """
        _register()
        if not all(layer.uses_interface for layer in model.attention_layers):
            raise UnreadableModelError(
                f"'{model.name}' does not attend through transformers' attention interface, which a cache with budgets "
                "for heads needs. Models of the Llama, Gemma, Qwen, Mistral, GPT-2 and most newer families do."
            )
        cache = self.cache(model)
        module: Any = model.module
        before = module.config._attn_implementation
        module.set_attn_implementation(_NAME)
        try:
            yield cache
        finally:
            module.set_attn_implementation(before)


class HeadCache(Cache):
    """A transformers ``Cache`` whose heads hold as many tokens as their budgets say."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__(layers=list(layers))

    @property
    def bytes(self) -> int:
        """Bytes really held by all layers, those with the model's own sliding window included."""
        return sum(self.layer_bytes())

    def layer_bytes(self) -> list[int]:
        """``[layers]`` bytes really held."""
        found = []
        for layer in self.layers:
            if isinstance(layer, HeadCacheLayer):
                found.append(layer.bytes)
            else:
                tensors = [each for each in (layer.keys, layer.values) if each is not None]
                found.append(sum(each.untyped_storage().nbytes() for each in tensors))
        return found

    def kept(self) -> list[list[int]]:
        """``[layers][kv_heads]`` tokens each head holds now; empty for layers with the model's own rule."""
        found: list[list[int]] = []
        for layer in self.layers:
            row: dict[int, int] = {}
            if isinstance(layer, HeadCacheLayer):
                row = {head: group.keys.shape[2] for group in layer.groups for head in group.heads}
            found.append([row[head] for head in sorted(row)])
        return found


def kv_scores(scores: HeadMap, model: HeadedModel) -> list[np.ndarray]:
    """A score for each key-value head of each layer: the highest of the query heads that share it.

    Raises:
        InputError: a map of another shape than the model.
    """
    if scores.shape != (model.layers, model.heads):
        raise InputError(
            f"A HeadMap of {scores.shape} was given; '{model.name}' has {model.layers} layers of {model.heads} heads."
        )
    found = []
    for layer, row in zip(model.attention_layers, scores.values, strict=True):
        own = np.nan_to_num(row[: layer.heads], nan=-np.inf)
        found.append(own.reshape(layer.kv_heads, -1).max(1))
    return found


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise InputError(
            f"{type(module).__name__} caps its logits or adds sinks of its own, which a cache with budgets for heads "
            "does not compute. Use the model's own cache."
        )
    layer = getattr(key, "_polyhead_layer", None)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    packs = query.dtype == torch.bfloat16 and query.device.type == "cpu" and query.shape[2] == 1
    if layer is None or (layer.is_whole and not (packs and query.shape[1] > key.shape[1])):
        output = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    else:
        output = layer.attend(query, mask, scale).transpose(1, 2).contiguous()
    if layer is not None:
        layer.settle(query, mask, scale)
    return output, None
