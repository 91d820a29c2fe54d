"""Mechanisms inside models as they are: as an attention of transformers, or in the place of one layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from polyhead.attention.base import Attention
from polyhead.attention.call import Call
from polyhead.errors import InputError
from polyhead.model import HeadedModel

__all__ = ["register", "replaced"]


def register(mechanism: Attention, name: str | None = None) -> str:
    """Make a mechanism without parameters an ``attn_implementation`` of transformers.

    The model projects and positions as always; ``score``, ``choose``, ``weigh`` and ``mix`` are the mechanism's.

    Args:
        mechanism: made with ``shape=None``.
        name: what to register as; None for ``polyhead_<the mechanism's name>``.

    Returns:
        The name, for ``model.set_attn_implementation(name)`` or ``from_pretrained(..., attn_implementation=name)``.

    Raises:
        InputError: the mechanism has projections or learned parameters of its own.

    Example:
        >>> from polyhead.attention import Attention, register
        >>> register(Attention(None))
        'polyhead_mha'
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if any(True for _ in mechanism.parameters()):
        raise InputError(
            f"{type(mechanism).__name__} has parameters of its own, which transformers would neither train nor save; "
            "expected one made with shape=None. Use replaced(model, {layer: mechanism}) instead."
        )
    name = name or f"polyhead_{mechanism.name.replace('-', '_')}"

    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        call = _stock_call(module, query, key, mask, kwargs)
        return mechanism.attend(query, key, value, call).transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    return name


def _stock_call(module: nn.Module, q: torch.Tensor, k: torch.Tensor, mask: Any, kwargs: Mapping[str, Any]) -> Call:
    tokens, keys = q.shape[2], k.shape[2]
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", False) if causal is None else causal) and tokens > 1 and mask is None
    if mask is not None and mask.dtype != torch.bool:
        mask = mask >= 0
    places = torch.arange(keys, device=q.device)[None]
    scale = kwargs.get("scaling")
    return Call(q[:, 0, :, :0], places[:, keys - tokens :], places, causal=causal, mask=mask, scale=scale)


@contextmanager
def replaced(model: HeadedModel, layers: Mapping[int, Attention]) -> Iterator[None]:
    """Run ``model`` with mechanisms in the place of some layers' attention while the block runs.

    A mechanism takes the states its layer's attention takes, and what it returns stands where the layer's output
    projection would; residuals, norms and everything else stay the model's. The layer's own attention still runs, and
    its result is dropped.

    Args:
        model: the model.
        layers: layer -> mechanism of the model's width.

    Raises:
        InputError: a layer the model does not have, or one whose module is not given hidden states by name or first.

    Example:
        >>> import polyhead
        >>> from polyhead.attention import Attention, replaced
        >>> from polyhead.heads.weights import read_weights
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> own = Attention.from_mha(read_weights(model, fold=False).layers[0])
        >>> with replaced(model, {0: own}):
        ...     states = model(**model.tokenize(["the same as before"])).last_hidden_state
    """
    handles: list[Any] = []
    places: list[_Place] = []
    try:
        for layer, mechanism in layers.items():
            if not 0 <= layer < model.layers:
                raise InputError(f"Layer {layer} was to be replaced; '{model.name}' has 0 to {model.layers - 1}.")
            at = model.attention_layers[layer]
            if at.call:
                raise InputError(f"Layer {layer} of '{model.name}' shares its weights with another; it has no place.")
            place = _Place(mechanism)
            handles.append(at.module.register_forward_pre_hook(place.before, with_kwargs=True))
            handles.append(at.output_projection.register_forward_hook(place.after))
            places.append(place)
        handles.append(model.module.register_forward_pre_hook(_remember(places), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _remember(places: Sequence[_Place]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        for place in places:
            place.padding = None if mask is None or mask.dim() != 2 or bool(mask.all()) else mask.bool()

    return hook


class _Place:
    """The states that enter a layer's attention, and what the mechanism makes of them."""

    def __init__(self, mechanism: Attention) -> None:
        self.mechanism = mechanism
        self.hidden: torch.Tensor | None = None
        self.padding: torch.Tensor | None = None

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("hidden_states", args[0] if args else None)
        if not isinstance(given, torch.Tensor) or given.dim() != 3:
            raise InputError("The layer's attention was not given hidden states [batch, tokens, dim] to take over.")
        self.hidden = given

    def after(self, _: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        assert self.hidden is not None
        return self.mechanism(self.hidden, self.padding).reshape(output.shape)
