"""Selective self-attention: a temperature for every query, and a volume for every value."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.attention.base import Attention, Positions, Triple
from polyhead.attention.call import AttentionShape, Call
from polyhead.papers import paper

__all__ = ["SelectiveSelfAttention", "TokenTemperature"]


class TokenTemperature(nn.Module):
    """``tanh(f(x))`` of a token, 0 at the start; one can serve all layers of a model.

    Args:
        dim: features of a token.
        width: features between the two layers of ``f``; None for ``dim / 16``.

    Example:
        >>> import torch
        >>> TokenTemperature(32)(torch.randn(2, 5, 32)).abs().max().item()
        0.0
    """

    def __init__(self, dim: int, width: int | None = None) -> None:
        super().__init__()
        self.down = nn.Linear(dim, width or max(1, dim // 16))
        self.out = nn.Linear(self.down.out_features, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[batch, tokens, dim]`` -> ``[batch, 1, tokens, 1]`` in (-1, 1)."""
        raised: torch.Tensor = self.out(F.gelu(self.down(hidden))).tanh()
        return raised[:, None]


@paper("selective-self-attention")
class SelectiveSelfAttention(Attention):
    """Query ``i``'s logits times ``tau_i = 1 + sigmoid(a) log(n_i) + tanh(f(x_i))``, values times ``1 + tanh(g(x_j))``.

    ``n_i`` is how many tokens query ``i`` sees. With ``position=False`` it starts as plain attention; otherwise
    ``sigmoid(a)`` starts at 0.02.

    Args:
        shape: widths.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        token: whether what a token says changes its temperature; or the :class:`TokenTemperature` that layers share.
        position: whether the number of visible tokens does.
        value: whether values are scaled; or the shared :class:`TokenTemperature`.

    Source:
        selective-self-attention (Zhang et al. 2024). The paper writes the value scale as a temperature like
        the query's; here it has the token term alone.

    Example:
        >>> import torch
        >>> shared = TokenTemperature(32)
        >>> layers = [SelectiveSelfAttention(AttentionShape(32, 4), token=shared) for _ in range(2)]
        >>> layers[0](torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    name: ClassVar[str] = "selective-self-attention"
    summary: ClassVar[str] = "A temperature for each query and a scale for each value"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        token: bool | TokenTemperature = True,
        position: bool = True,
        value: bool | TokenTemperature = True,
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        self.token = TokenTemperature(shape.dim) if token is True else (token or None)
        self.value = TokenTemperature(shape.dim) if value is True else (value or None)
        self.growth = nn.Parameter(torch.tensor(-4.0)) if position else None

    def project(self, hidden: torch.Tensor) -> Triple:
        """Queries, keys, and values at their volume."""
        q, k, v = super().project(hidden)
        return q, k, v if self.value is None else v * (1 + self.value(hidden))

    def temperature(self, call: Call) -> torch.Tensor | float:
        """``[batch or 1, 1, query tokens, 1]`` factor of each query's logits; 1 with all terms off."""
        tau: torch.Tensor | float = 1.0
        if self.growth is not None:
            if call.causal:
                seen = call.q_positions + 1
            elif call.padding is not None:
                seen = call.padding.sum(1, keepdim=True)
            else:
                seen = torch.full_like(call.q_positions[:, :1], call.k_positions.shape[1])
            tau = 1 + self.growth.sigmoid() * seen.clamp_min(1).to(self.growth.dtype).log()[:, None, :, None]
        return tau if self.token is None else tau + self.token(call.hidden)

    def inner(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries times scale and temperature, and keys."""
        return q * self.scale(q, call) * self.temperature(call), k
