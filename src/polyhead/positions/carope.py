"""Context-aware rotary positions: how far a token turns what follows depends on what it says, head by head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.papers import paper
from polyhead.positions.rotary import rotate

if TYPE_CHECKING:
    from polyhead.attention.call import Call

__all__ = ["ContextRotaryPositions", "rate_maps"]

_KEPT = "turned"


@paper("carope")
class ContextRotaryPositions(nn.Module):
    """Pair ``i`` (from 1) turns by ``phi_i(m) = sum_{t <= m} f(x_t)^i``, with ``f = 1 / (1 + softplus(x W))``.

    With ``f`` constant it is rotary position embedding, its pairs counted from 1. ``f`` lies in (0, 1), so no pair
    turns by more than a radian a token. A step carries the phases so far, one set of a text.

    Args:
        dim: features of a token.
        heads: heads that turn on their own; key-value heads where queries share them.
        head_dim: features of a head, even.
        base: None for ``x W`` as in the paper; a number adds the offset with which ``W = 0`` turns pair ``i`` as rotary
            positions of this base do, so that training starts there (``W`` starts at 0 then).

    Raises:
        InputError: an odd number of features, or a base of 1 or less.

    Source:
        carope (Veisi et al. 2025).

    Example:
        >>> import torch
        >>> from polyhead.attention import Attention, AttentionShape
        >>> layer = Attention(AttentionShape(32, 4), causal=True, positions=ContextRotaryPositions(32, 4, 8))
        >>> layer(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(self, dim: int, heads: int, head_dim: int, *, base: float | None = None) -> None:
        super().__init__()
        if head_dim % 2 or head_dim < 2:
            raise InputError(f"Rotary positions for {head_dim} features were asked for; expected an even number.")
        if base is not None and not base > 1:
            raise InputError(f"base={base} was given; expected a number above 1, such as 10000, or None.")
        self.head_dim = head_dim
        self.offset = 0.0
        self.route = nn.Linear(dim, heads, bias=False)
        if base is not None:
            nn.init.zeros_(self.route.weight)
            self.offset = math.log(math.expm1(base ** (2 / head_dim) - 1))

    def rates(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[batch, heads, tokens]`` what each token ``[batch, tokens, dim]`` turns the first pair by, in radians."""
        return (1 / (1 + F.softplus(self.route(hidden) + self.offset))).transpose(1, 2)

    def phases(self, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """``[batch, heads, tokens, head_dim / 2]`` angles in radians, in float32 at least; padding turns nothing."""
        rates = self.rates(hidden)
        if padding is not None:
            rates = rates * padding[:, None].to(rates.dtype)
        rates = rates.to(torch.promote_types(rates.dtype, torch.float32))[..., None]
        powers = torch.arange(1, self.head_dim // 2 + 1, device=hidden.device, dtype=rates.dtype)
        return (rates**powers).cumsum(2)

    def forward(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, turned.

        Raises:
            InputError: heads that the key-value heads do not share; a stock model's queries, which came without
                hidden states; a mechanism whose step does not carry what positions leave behind.
        """
        heads = self.route.out_features
        if k.shape[1] % heads or call.hidden.shape[-1] != self.route.in_features:
            raise InputError(
                f"{k.shape[1]} key-value heads of tokens with {call.hidden.shape[-1]} features were given; expected a "
                f"multiple of {heads} heads and {self.route.in_features} features."
            )
        phases = self.phases(call.hidden, call.padding)
        if call.before is not None:
            if call.before and _KEPT not in call.before:
                raise InputError(
                    "This mechanism's step does not carry the phases of context-aware positions; run it on the whole "
                    "text, or use a mechanism with the stock step."
                )
            if call.before:
                phases = phases + call.before[_KEPT]
            call.after[_KEPT] = phases[:, :, -1:].clone()
        turned = [rotate(each, phases.repeat_interleave(each.shape[1] // heads, 1)) for each in (q, k)]
        return turned[0], turned[1]


@torch.no_grad()
def rate_maps(model: nn.Module, *inputs: Any) -> tuple[HeadMap, HeadMap]:
    """How fast each head turns in a run of ``model(*inputs)``: mean over tokens, and how much tokens differ.

    Args:
        model: with one layer that has such positions or more, of as many heads each.
        inputs: of the model.

    Returns:
        Mean and standard deviation of ``f`` over real tokens, ``[layers, heads]``, layers in the order they ran.

    Raises:
        InputError: a model without such positions.

    Example:
        >>> from polyhead.attention import Attention, AttentionShape
        >>> layer = Attention(AttentionShape(32, 4), positions=ContextRotaryPositions(32, 4, 8))
        >>> [each.values.shape for each in rate_maps(layer, torch.randn(1, 5, 32))]
        [(1, 4), (1, 4)]
    """
    found: list[torch.Tensor] = []

    def note(positions: ContextRotaryPositions, given: tuple[Any, ...]) -> None:
        call: Call = given[2]
        rates = positions.rates(call.hidden).transpose(1, 2).double()
        found.append(rates.flatten(0, 1) if call.padding is None else rates[call.padding])

    parts = [part for part in model.modules() if isinstance(part, ContextRotaryPositions)]
    if not parts:
        raise InputError("A model without context-aware positions was given; expected ContextRotaryPositions.")
    hooks = [part.register_forward_pre_hook(note) for part in parts]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    mean = torch.stack([each.mean(0) for each in found]).numpy()
    spread = torch.stack([each.std(0, correction=0) for each in found]).numpy()
    return (
        HeadMap(mean, "turn of the first pair", higher_means="turns faster"),
        HeadMap(spread, "spread of that turn over tokens", higher_means="turns by what a token says"),
    )
