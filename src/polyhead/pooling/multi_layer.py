"""Learned queries ask all layers, each pooled over tokens first (multi-layers trainable pooling)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.papers.marks import paper
from polyhead.pooling.base import Pooler, Reads

__all__ = ["MultiLayerPooler"]


@paper("multi-layer-trainable-pooling")
class MultiLayerPooler(Pooler):
    """``latents`` learned queries attend to the layers' pooled states; a network and the mean over queries follow.

    Every layer is pooled over tokens without weights, which gives ``H [layers + 1, dim]``; a learned vector a layer is
    added to it or multiplies it; queries attend to the normalised rows by head; input is added back; a network of one
    hidden layer does the same; the queries' outputs are averaged (arXiv 2409.02727, section 4). The paper speaks of
    weights a layer, the released code adds them: both are here. The paper takes the last token, or the mean where the
    model looks both ways.

    Args:
        layers: of the model; the states before the first layer are read too.
        dim: of the states.
        latents: how many queries.
        heads: of the attention; divides ``dim``.
        pooling: of a layer's tokens, a name of :data:`polyhead.pooling.POOLERS` that gives ``dim`` numbers.
        weigh: "add" or "multiply", what is done with the learned vector of a layer.
        hidden: width of the network; None: ``4 * dim``.

    Raises:
        InputError: ``heads`` does not divide ``dim``, an unknown name, or states of another number of layers.

    Example:
        >>> import torch
        >>> from polyhead.pooling import MultiLayerPooler
        >>> pooler = MultiLayerPooler(layers=2, dim=16, latents=4, heads=2)
        >>> pooler(torch.randn(5, 7, 3, 16), torch.ones(5, 7)).shape      # [batch, tokens, layers + 1, dim]
        torch.Size([5, 16])
    """

    reads: ClassVar[Reads] = "layers"
    knobs = ("layers", "dim", "latents", "heads", "pooling", "weigh", "hidden")

    def __init__(
        self,
        layers: int,
        dim: int,
        latents: int = 64,
        heads: int = 8,
        *,
        pooling: str = "mean",
        weigh: Literal["add", "multiply"] = "add",
        hidden: int | None = None,
    ) -> None:
        from polyhead.pooling import pooler_for

        super().__init__()
        if heads < 1 or dim % heads:
            raise InputError(f"{heads} heads do not divide a state of {dim} numbers; give a divisor of it.")
        if weigh not in ("add", "multiply"):
            raise InputError(f"weigh = {weigh!r}, expected 'add' or 'multiply'.")
        self.layers, self.dim, self.latents, self.heads = layers, dim, latents, heads
        self.pooling, self.weigh, self.hidden = pooling, weigh, 4 * dim if hidden is None else hidden
        self.tokens = pooler_for(pooling)
        first = torch.randn if weigh == "add" else torch.ones
        self.layer = nn.Parameter(first(layers + 1, dim))
        self.queries = nn.Parameter(torch.randn(latents, dim))
        self.read_norm, self.query_norm, self.network_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.query, self.key, self.value, self.mix = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.network = nn.Sequential(nn.Linear(dim, self.hidden), nn.GELU(), nn.Linear(self.hidden, dim))

    def forward(self, states: Tensor, mask: Tensor, skip: int | Tensor = 0, ids: Tensor | None = None) -> Tensor:
        """See :class:`Pooler`; states ``[batch, tokens, layers + 1, dim]``."""
        if states.dim() != 4 or tuple(states.shape[2:]) != (self.layers + 1, self.dim):
            expected = f"[batch, tokens, {self.layers + 1}, {self.dim}]"
            raise InputError(f"States of shape {list(states.shape)} were given, expected {expected}.")
        return super().forward(states, mask, skip, ids)

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`."""
        layers = self.tokens.pool(states.flatten(2), counted, positions).unflatten(-1, (self.layers + 1, self.dim))
        layers = self.read_norm(layers + self.layer if self.weigh == "add" else layers * self.layer)
        query = self._by_head(self.query(self.query_norm(self.queries)))
        key, value = self._by_head(self.key(layers)), self._by_head(self.value(layers))
        weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
        read = weights @ value
        given = self.mix(read.transpose(1, 2).flatten(2)) + self.queries
        given = given + self.network(self.network_norm(given))
        return given.mean(1) * counted.any(dim=1, keepdim=True).to(given.dtype)

    def _by_head(self, vectors: Tensor) -> Tensor:
        """``[..., n, dim]`` as ``[..., heads, n, head_dim]``."""
        return vectors.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
