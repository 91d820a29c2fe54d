"""What stands in for a decoder's attention module: the plumbing that latent layers share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyhead.compress._compare import difference_of, output_of, random_inputs, tolerance_of
from polyhead.errors import InputError, UnreadableModelError
from polyhead.structure import AttentionLayer

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Replacement", "linear_of", "parity_or_refuse", "replaced", "turned"]

_NEEDED = ("q_proj", "k_proj", "v_proj", "o_proj", "config", "layer_idx", "scaling")


class Replacement(nn.Module):
    """An attention module with the old one's query and output projections, kernel, scale and place in the cache.

    Args:
        layer: the layer it takes the place of; its own modules are taken over.
    """

    cache_numbers_per_token: int
    """Numbers that a decoding cache keeps of a token."""

    def __init__(self, layer: AttentionLayer) -> None:
        super().__init__()
        old: Any = layer.module
        self.config, self.layer_idx, self.scaling = old.config, old.layer_idx, old.scaling
        self.heads, self.kv_heads, self.head_dim = layer.heads, layer.kv_heads, layer.head_dim
        self.num_key_value_groups = layer.heads // layer.kv_heads
        self.is_causal = getattr(old, "is_causal", True)
        self.attention_dropout = getattr(old, "attention_dropout", 0.0)
        self.sliding_window = layer.sliding_window
        self.q_proj, self.o_proj = old.q_proj, old.o_proj

    def run_kernel(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Any]:
        """Head outputs ``[batch, tokens, heads, value_dim]`` of the model's own kernel, and weights if it has them."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
        from transformers.models.llama.modeling_llama import eager_attention_forward

        kernel = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if self.sliding_window is not None:
            kwargs["sliding_window"] = self.sliding_window
        dropout = self.attention_dropout if self.training else 0.0
        found: tuple[torch.Tensor, Any] = kernel(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return found

    def split(self, features: torch.Tensor, heads: int) -> torch.Tensor:
        """``[batch, tokens, heads x size]`` -> ``[batch, heads, tokens, size]``."""
        return features.unflatten(-1, (heads, -1)).transpose(1, 2)


def turned(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Pairs ``(i, i + pairs)`` of ``2 x pairs`` features, turned by angles of cosine and sine ``[..., pairs]``."""
    first, second = states.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def linear_of(weight: torch.Tensor, bias: torch.Tensor | None, like: nn.Module) -> nn.Linear:
    """A linear layer of a weight ``[out, in]``, in the dtype and on the device of another."""
    made = nn.Linear(1, 1, bias=bias is not None, device="meta")
    made.out_features, made.in_features = weight.shape
    old = like.weight
    assert isinstance(old, torch.Tensor)
    made.weight = nn.Parameter(weight.detach().to(old).contiguous())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(old).contiguous())
    return made


def replaced(model: HeadedModel, make: Callable[[AttentionLayer], nn.Module], *, refuse: Mapping[str, str]) -> Any:
    """A copy of the model with each layer's attention made anew.

    Args:
        model: stays as it is.
        make: the new module of a layer (of the copy).
        refuse: attribute of an attention module -> why a model that has it cannot be converted.

    Raises:
        UnreadableModelError: attention modules of another build.
    """
    from polyhead.model import HeadedModel

    copied = HeadedModel(copy.deepcopy(model.module), name=model.name, files=model.files)
    for layer in copied.attention_layers:
        missing = [name for name in _NEEDED if not hasattr(layer.module, name)]
        if missing or not layer.uses_interface:
            raise UnreadableModelError(
                f"'{model.name}' cannot get latent attention: '{layer.path}' has no {missing[0] if missing else 'tap'};"
                " expected separate q_proj, k_proj, v_proj, o_proj and rotary positions (Llama, Mistral, Qwen, ...)."
            )
        for name, why in refuse.items():
            if getattr(layer.module, name, None) is not None:
                raise UnreadableModelError(f"'{model.name}' cannot get latent attention: '{layer.path}' {why}.")
    for layer in copied.attention_layers:
        parent, _, name = layer.path.rpartition(".")
        setattr(copied.module.get_submodule(parent), name, make(layer))
    return copied.module


def parity_or_refuse(model: HeadedModel, module: nn.Module) -> float:
    """Largest difference of a conversion that ought to be exact from the original, or a refusal.

    Raises:
        UnreadableModelError: it does not run, or is not exact.
    """
    from polyhead.model import HeadedModel

    inputs = random_inputs(model)
    try:
        given = output_of(HeadedModel(module, name=model.name), inputs)
        difference = difference_of(given, output_of(model, inputs))
    except (RuntimeError, TypeError, InputError) as error:
        raise UnreadableModelError(f"'{model.name}' does not run with latent attention: {error}") from error
    if not difference <= 10 * tolerance_of(model):
        raise UnreadableModelError(
            f"'{model.name}' cannot get latent attention: at full rank its output differs by {difference:.2g}; its "
            "layers do something between projection and attention that is not known here."
        )
    return difference
