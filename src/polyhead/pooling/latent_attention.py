"""Latent attention: every token asks a learned array of latents, then the mean (NV-Embed)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyhead.errors import InputError
from polyhead.papers.marks import paper
from polyhead.pooling.base import Pooler, weighted_sum

__all__ = ["LatentAttentionPooler"]


@paper("nv-embed")
class LatentAttentionPooler(Pooler):
    """Tokens attend to ``latents`` learned vectors, pass a network of one hidden layer, and are averaged.

    ``O = softmax(Q K^T / sqrt(d_h)) V`` with queries from the token states and keys and values from the latents, by
    head; then Linear, GELU, Linear; then the mean over the tokens that count (NV-Embed, arXiv 2405.17428, section 3.1).
    As in the released model, heads have projections, and with ``residual`` the input of attention and of the network
    is added to their output.

    Args:
        dim: of the states.
        latents: how many.
        heads: of the attention; divides ``dim``.
        hidden: width of the network; None: ``4 * dim``.
        residual: whether inputs are added back. The paper's formula has none, the released model has.

    Raises:
        InputError: ``heads`` does not divide ``dim``.

    Example:
        >>> import torch
        >>> from polyhead.pooling import LatentAttentionPooler
        >>> pooler = LatentAttentionPooler(16, latents=8, heads=4)
        >>> pooler(torch.randn(2, 5, 16), torch.ones(2, 5)).shape
        torch.Size([2, 16])
    """

    knobs = ("dim", "latents", "heads", "hidden", "residual")

    def __init__(
        self, dim: int, latents: int = 512, heads: int = 8, *, hidden: int | None = None, residual: bool = True
    ) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise InputError(f"{heads} heads do not divide a state of {dim} numbers; give a divisor of it.")
        self.dim, self.latents, self.heads, self.residual = dim, latents, heads, residual
        self.hidden = 4 * dim if hidden is None else hidden
        self.array = nn.Parameter(torch.randn(latents, dim))
        self.query, self.key, self.value, self.mix = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.network = nn.Sequential(nn.Linear(dim, self.hidden), nn.GELU(), nn.Linear(self.hidden, dim))

    def attend(self, states: Tensor) -> Tensor:
        """What the tokens ``[batch, tokens, dim]`` read from the latents, the same shape."""
        # The latents are the same for all texts, so that all tokens are the queries of one attention.
        query, key, value = (
            rows.unflatten(-1, (self.heads, -1)).transpose(0, 1).unsqueeze(0)
            for rows in (self.query(states).flatten(0, 1), self.key(self.array), self.value(self.array))
        )
        read = functional.scaled_dot_product_attention(query, key, value).squeeze(0).transpose(0, 1).flatten(1)
        return self.mix(read).view(states.shape)

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`."""
        states = states.masked_fill(~counted.unsqueeze(-1), 0.0)
        read = self.attend(states)
        if self.residual:
            read = read + states
        given = self.network(read)
        if self.residual:
            given = given + read
        weights = counted.to(given.dtype)
        return weighted_sum(given, weights) / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
