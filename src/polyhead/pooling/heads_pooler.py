"""Chosen heads and layer states, tokens weighed, through one linear map: what a fitted head pooling computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyhead.errors import InputError
from polyhead.pooling.base import Pooler, Reads, token_positions, weighted_sum

__all__ = ["BlockPooler"]


class BlockPooler(Pooler):
    """``A [x_b - m_b] for the blocks b``, where ``x_b = sum_t s_t x_bt / sum_t s_t`` and a block is a head or a layer.

    ``s_t`` is the weight of the token's id (times its position, counted from 1, under ``by_position``). With ``blend``
    the blocks are all layers' states, added up with one weight each before ``A``: that form folds into
    sentence-transformers' ``WeightedLayerPooling``, ``WordWeights``, ``Pooling`` and ``Dense``.

    Made by :class:`polyhead.pooling.HeadPooler`, whose ``fit`` sets the weights.

    Args:
        layers: states to read: 0 is what enters the first layer, ``l`` what leaves layer ``l - 1``.
        heads: heads to read, ``(layer, head)`` from 0, outputs before the output projection.
        sizes: numbers of a state, heads of a layer, numbers of a head.
        vocabulary: token ids there are.
        out: numbers of the vector; 0 gives the blocks side by side, without ``A``.
        blend: whether the layers are added up.
        by_position: whether later tokens weigh more.

    Raises:
        InputError: no block, a blend of heads, or token ids are not given to ``forward``.
    """

    reads: ClassVar[Reads] = "blocks"
    layers: list[int]
    heads: list[tuple[int, int]]
    token_weights: Tensor
    layer_weights: Tensor | None
    map: Tensor | None
    offset: Tensor | None
    _columns: Tensor | None
    knobs = ("layers", "heads", "sizes", "vocabulary", "out", "blend", "by_position")

    def __init__(
        self,
        layers: Sequence[int],
        heads: Sequence[tuple[int, int]],
        sizes: Sequence[int],
        vocabulary: int,
        out: int = 0,
        *,
        blend: bool = False,
        by_position: bool = False,
    ) -> None:
        super().__init__()
        if not layers and not heads:
            raise InputError("A pooler of no heads and no layers has nothing to read; choose at least one.")
        if blend and heads:
            raise InputError("Heads cannot be blended, their spaces differ; choose layers, or blend=False.")
        self.layers, self.heads = [int(layer) for layer in layers], [(int(layer), int(head)) for layer, head in heads]
        self.sizes, self.vocabulary, self.out = [int(size) for size in sizes], vocabulary, out
        self.blend, self.by_position = blend, by_position
        hidden, _, head_dim = self.sizes
        self.width = hidden if blend else hidden * len(self.layers) + head_dim * len(self.heads)
        self.register_buffer("token_weights", torch.ones(vocabulary))
        self.register_buffer("layer_weights", torch.ones(len(self.layers)) if blend else None)
        self.register_buffer("map", torch.zeros(out, self.width) if out else None)
        self.register_buffer("offset", torch.zeros(out) if out else None)
        self.register_buffer("_columns", self._chosen_columns() if heads else None, persistent=False)

    @property
    def head_layers(self) -> list[int]:
        """Layers of which heads are read, rising."""
        return sorted({layer for layer, _ in self.heads})

    def _chosen_columns(self) -> Tensor:
        """Where the chosen blocks are among the states that are read."""
        hidden, heads, head_dim = self.sizes
        starts = {layer: hidden * len(self.layers) + i * heads * head_dim for i, layer in enumerate(self.head_layers)}
        columns = [torch.arange(hidden * len(self.layers))]
        columns += [torch.arange(head_dim) + starts[layer] + head * head_dim for layer, head in self.heads]
        return torch.cat(columns)

    def forward(self, states: Tensor, mask: Tensor, skip: int | Tensor = 0, ids: Tensor | None = None) -> Tensor:
        """See :class:`Pooler`; states ``[batch, tokens, columns]``: the layers', then all heads of each head layer."""
        if ids is None:
            raise InputError("BlockPooler weighs tokens by what they are: give it ids [batch, tokens].")
        weights = self.token_weights[ids.clamp(max=self.vocabulary - 1)]
        positions = token_positions(mask)
        weights = weights * ((mask != 0) & (positions > skip))
        if self.by_position:
            weights = weights * positions
        pooled = weighted_sum(states.to(weights.dtype), weights) / weights.sum(1, keepdim=True).clamp(min=1e-9)
        return self.combine(pooled if self._columns is None else pooled[:, self._columns])

    def columns_in(self, wider: BlockPooler) -> list[int]:
        """Where this pooler's blocks are among the pooled blocks of one that reads more."""
        hidden, _, head_dim = self.sizes
        starts = [hidden * wider.layers.index(layer) for layer in self.layers]
        first = hidden * len(wider.layers)
        heads = [first + head_dim * wider.heads.index(pair) for pair in self.heads]
        spans = [(start, hidden) for start in starts] + [(start, head_dim) for start in heads]
        return [column for start, width in spans for column in range(start, start + width)]

    def combine(self, blocks: Tensor) -> Tensor:
        """Pooled blocks ``[n, columns of the chosen blocks]`` to vectors ``[n, out]``."""
        if self.layer_weights is not None:
            blocks = torch.einsum("nld,l->nd", blocks.unflatten(1, (len(self.layers), -1)), self.layer_weights)
        return blocks if self.map is None else functional.linear(blocks, self.map, self.offset)

    def output_dim(self, dim: int) -> int:
        """See :class:`Pooler`."""
        return self.out or self.width

    def stock_modules(self, dim: int, include_prompt: bool = True) -> list[nn.Module] | None:
        """See :class:`Pooler`; there are such modules for a blend of layers without positions, the prompt included."""
        if not self.blend or self.by_position or not include_prompt or self.map is None or self.offset is None:
            return None
        from sentence_transformers.base.modules.dense import Dense
        from sentence_transformers.sentence_transformer.modules import Pooling, WeightedLayerPooling, WordWeights

        weights: Any = self.layer_weights
        total = weights.sum()
        blended = WeightedLayerPooling(dim, len(self.layers) - 1, 0, nn.Parameter(weights.clone()))
        names = [str(number) for number in range(self.vocabulary)]
        weighed = zip(names, self.token_weights.tolist(), strict=True)
        known = {name: weight for name, weight in weighed if weight != 1.0}
        matrix, offset = self.map * total, self.offset.clone()
        dense = Dense(dim, self.out, True, nn.Identity(), matrix, offset)
        return [blended, WordWeights(names, known), Pooling(dim, "mean", include_prompt), dense]
