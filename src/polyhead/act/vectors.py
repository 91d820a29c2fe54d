"""What actions with one vector a head share: which heads, which tokens, and means over texts."""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch

from polyhead.act.base import HeadAction
from polyhead.errors import InputError

if TYPE_CHECKING:
    from polyhead.heads.base import Progress
    from polyhead.model import HeadedModel

__all__ = ["Heads", "Positions", "VectorAction", "head_mask", "last_logits", "last_tokens", "mean_heads"]

Heads = Iterable[tuple[int, int]] | np.ndarray | torch.Tensor | None
Positions = Literal["all", "last", "prompt"] | torch.Tensor
Self = TypeVar("Self", bound="VectorAction")


def head_mask(heads: Heads, layers: int, width: int) -> torch.Tensor:
    """Boolean ``[layers, heads]`` of what names heads: a mask, a list of ``(layer, head)``, or None for all.

    ``HeadMap.mask`` and ``HeadMap.top`` give the first two.

    Raises:
        InputError: a mask of another shape, or a head outside it.
    """
    if heads is None:
        return torch.ones(layers, width, dtype=torch.bool)
    if isinstance(heads, (np.ndarray, torch.Tensor)):
        mask = torch.as_tensor(heads)
        if mask.dtype != torch.bool or tuple(mask.shape) != (layers, width):
            raise InputError(
                f"Heads were named by {mask.dtype} of shape {list(mask.shape)}; expected a boolean mask "
                f"[{layers}, {width}] (HeadMap.mask), or a list of (layer, head)."
            )
        return mask.cpu()
    mask = torch.zeros(layers, width, dtype=torch.bool)
    for layer, head in heads:
        if not (0 <= layer < layers and 0 <= head < width):
            raise InputError(f"Head {head} of layer {layer} was named; there are {layers} layers of {width} heads.")
        mask[layer, head] = True
    return mask


class VectorAction(HeadAction):
    """An action with one vector a head; what it does with it is up to :meth:`altered`.

    Args:
        vectors: ``[layers, heads, head_dim]``.
        heads: which heads; None for all.
        positions: "all" tokens, the "last" of each forward pass (pad on the left), the last of a "prompt" (passes of
            a single token, the steps of a generation, are left alone), or ``[batch]`` indices of tokens.
    """

    def __init__(self, vectors: np.ndarray | torch.Tensor, heads: Heads = None, positions: Positions = "all") -> None:
        self.vectors = torch.as_tensor(vectors)
        if self.vectors.dim() != 3:
            raise InputError(f"Vectors need the shape [layers, heads, head_dim], got {list(self.vectors.shape)}.")
        if isinstance(positions, str) and positions not in ("all", "last", "prompt"):
            raise InputError(f"positions is {positions!r}, expected 'all', 'last', 'prompt' or indices [batch].")
        self.chosen = head_mask(heads, *self.vectors.shape[:2])
        self.positions = positions

    def at(self: Self, positions: Positions) -> Self:
        """The same action at other tokens; vectors are shared."""
        other = copy.copy(self)
        other.positions = positions
        return other

    def check(self, model: HeadedModel) -> None:
        """See :class:`HeadAction`."""
        expected = (model.layers, model.heads, model.head_dim)
        if tuple(self.vectors.shape) != expected:
            raise InputError(
                f"The vectors have the shape {list(self.vectors.shape)}; '{model.name}' needs {list(expected)}: "
                "layers, heads, head_dim."
            )

    @abstractmethod
    def altered(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """New outputs for all heads and tokens, ``[batch, tokens, heads, head_dim]``; only chosen ones are used."""

    def vector(self, layer: int, like: torch.Tensor) -> torch.Tensor:
        """The layer's vectors ``[heads, head_dim]`` in the kind of ``like`` ``[..., heads, head_dim]``."""
        return self.vectors[layer, : like.shape[-2], : like.shape[-1]].to(like.device, like.dtype)

    def change(self, layer: int, heads: torch.Tensor) -> torch.Tensor | None:
        """See :class:`HeadAction`."""
        chosen = self.chosen[layer, : heads.shape[-2]]
        one_token = heads.shape[-3] == 1
        if not bool(chosen.any()) or (isinstance(self.positions, str) and self.positions == "prompt" and one_token):
            return None
        where = chosen.to(heads.device)[:, None]
        if not (isinstance(self.positions, str) and self.positions == "all"):
            where = where & _tokens_at(self.positions, heads)[..., None, None]
        elif bool(chosen.all()):
            return self.altered(layer, heads)
        return torch.where(where, self.altered(layer, heads), heads)


def _tokens_at(positions: Positions, heads: torch.Tensor) -> torch.Tensor:
    """Boolean ``[batch or 1, tokens]`` of the tokens meant."""
    count = torch.arange(heads.shape[-3], device=heads.device)
    if isinstance(positions, str):
        return (count == heads.shape[-3] - 1)[None]
    if positions.shape != heads.shape[:1]:
        raise InputError(f"Positions of {list(positions.shape)} rows were given, the batch has {heads.shape[0]} rows.")
    return count == positions.to(heads.device)[:, None]


def last_tokens(attention_mask: torch.Tensor) -> torch.Tensor:
    """Index ``[batch]`` of each row's last token that is not padding."""
    count = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask.bool() * (count + 1)).argmax(1)


def last_logits(model: HeadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits ``[batch, vocabulary]`` float32 after each row's last token, computed there alone where the model can.

    Raises:
        InputError: the model gives no logits.
    """
    last = last_tokens(inputs["attention_mask"])
    at_end = bool((last == inputs["attention_mask"].shape[1] - 1).all())
    one = at_end and "logits_to_keep" in inspect.signature(model.module.forward).parameters
    logits = getattr(model(**inputs, **({"logits_to_keep": 1} if one else {})), "logits", None)
    if logits is None:
        raise InputError(f"'{model.name}' gives no logits: load it with load(name, lm_head=True).")
    found: torch.Tensor = logits[:, -1] if one else logits[torch.arange(len(last)), last]
    return found.float()


def mean_heads(
    model: HeadedModel,
    texts: Sequence[str],
    *,
    positions: Literal["all", "last"] = "all",
    batch_size: int = 16,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Mean output of every head, ``[layers, heads, head_dim]`` float64, over all tokens of texts or over their last.

    Padding counts for nothing. One layer's outputs are held at a time.

    Raises:
        InputError: no texts.
    """
    if not texts:
        raise InputError("A mean over no texts was asked for; give at least one.")
    total = torch.zeros(model.layers, model.heads, model.head_dim, dtype=torch.float64, device=model.device)
    seen = 0
    for inputs in batches_of(model, texts, batch_size):
        mask = inputs["attention_mask"].bool()
        if positions == "last":
            mask = torch.arange(mask.shape[1], device=mask.device) == last_tokens(mask)[:, None]
        seen += int(mask.sum())

        def add(layer: int, heads: torch.Tensor, mask: torch.Tensor = mask) -> None:
            summed = heads[mask].double().sum(0)
            total[layer, : summed.shape[0], : summed.shape[1]] += summed

        with model.tap_heads(add), torch.inference_mode():
            model(**inputs)
        if progress is not None:
            progress(seen, None)
    return total / seen


def batches_of(model: HeadedModel, texts: Sequence[str], batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Tokenized batches, cut at what the model can take."""
    for first in range(0, len(texts), batch_size):
        yield model.tokenize(list(texts[first : first + batch_size]), truncation=True)
