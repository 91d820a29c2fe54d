"""What one run of an attention layer knows: who may look at whom, and where everybody stands."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from polyhead.errors import InputError

__all__ = ["AttentionShape", "Call", "State", "check_input", "positions_of"]


@dataclass(frozen=True)
class AttentionShape:
    """Widths of a layer.

    Attributes:
        dim: features of a token.
        heads: query heads.
        kv_heads: key-value heads, each shared by ``heads / kv_heads`` query heads; None for one a query head.
        head_dim: features of a head; None for ``dim / heads``.
        bias: whether the projections have one.

    Raises:
        InputError: counts that do not divide.

    Example:
        >>> AttentionShape(384, 12).width
        384
    """

    dim: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    bias: bool = False

    def __post_init__(self) -> None:
        if self.dim < 1 or self.heads < 1 or (self.head_dim is None and self.dim % self.heads):
            raise InputError(
                f"{self.heads} heads for {self.dim} features were given; expected heads that divide the features, or "
                "a head_dim."
            )
        if self.heads % self.groups_of:
            raise InputError(
                f"{self.heads} query heads with {self.groups_of} key-value heads were given; expected a count that "
                "divides the query heads."
            )

    @property
    def groups_of(self) -> int:
        """Key-value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def size(self) -> int:
        """Features of a head."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def width(self) -> int:
        """Features of all query heads side by side."""
        return self.heads * self.size


@dataclass
class Call:
    """One run of a layer.

    Attributes:
        hidden: ``[batch, tokens, dim]``, what the queries were made of; empty where a stock model's queries came in.
        q_positions, k_positions: ``[batch or 1, tokens]``, places in the text, counted over real tokens from 0.
        padding: ``[batch, key tokens]``, True at real tokens; None where all are.
        causal: whether a token sees only what stands at or before its own place.
        mask: ``[batch or 1, heads or 1, query tokens, key tokens]`` True where looking is allowed, in place of what
            ``padding`` and ``causal`` say; for stock models, which bring their own.
        scale: factor of the logits, None for ``head_dim ** -0.5``.
        keys_hidden: ``[batch, key tokens, dim]`` what the keys were made of; same as ``hidden`` outside of steps.
        before: what the steps before left behind, by name, batch first; empty at the first, None outside of steps.
        after: what a part of the layer leaves for the next step, besides keys and values.
    """

    hidden: torch.Tensor
    q_positions: torch.Tensor
    k_positions: torch.Tensor
    padding: torch.Tensor | None = None
    causal: bool = False
    mask: torch.Tensor | None = None
    scale: float | None = None
    keys_hidden: torch.Tensor | None = None
    before: dict[str, torch.Tensor] | None = None
    after: dict[str, torch.Tensor] = field(default_factory=dict)

    def allowed(self) -> torch.Tensor | None:
        """``[batch or 1, heads or 1, query tokens, key tokens]`` True where looking is allowed; None: everywhere."""
        if self.mask is not None:
            return self.mask
        allowed = None if self.padding is None else self.padding[:, None, None, :]
        if self.causal:
            order = (self.k_positions[:, None, :] <= self.q_positions[:, :, None])[:, None]
            allowed = order if allowed is None else allowed & order
        return allowed


@dataclass
class State:
    """What a layer keeps between steps of decoding.

    Attributes:
        seen: tokens so far.
        tensors: by name; batch first.
    """

    seen: int = 0
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Bytes really held, over the whole batch."""
        return sum(each.untyped_storage().nbytes() for each in self.tensors.values())


def positions_of(hidden: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """``[batch or 1, tokens]`` places counted over real tokens, so that padding on either side changes nothing."""
    if padding is None:
        return torch.arange(hidden.shape[1], device=hidden.device)[None]
    return (padding.long().cumsum(1) - 1).clamp_min(0)


def check_input(hidden: torch.Tensor, padding: torch.Tensor | None, dim: int) -> None:
    """Refuse what is not ``[batch, tokens, dim]`` with ``[batch, tokens]`` booleans beside it.

    Raises:
        InputError: says which shape was given and which expected.
    """
    if hidden.dim() != 3 or hidden.shape[2] != dim:
        raise InputError(f"Hidden states {list(hidden.shape)} were given; expected [batch, tokens, {dim}].")
    if padding is not None and (padding.shape != hidden.shape[:2] or padding.dtype != torch.bool):
        raise InputError(
            f"Padding {list(padding.shape)} of {padding.dtype} was given; expected booleans {list(hidden.shape[:2])}, "
            "True at real tokens (attention_mask.bool())."
        )
