"""A learned weighting of layers before a plain pooling; folds into sentence-transformers' own modules."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.pooling.base import Pooler, Reads, pooler_from
from polyhead.pooling.mean import MeanPooler

__all__ = ["WeightedLayersPooler"]


class WeightedLayersPooler(Pooler):
    """``pool(sum_l a_l x_l / sum_l a_l)``: one learned weight a layer, then a pooling of tokens.

    Weights begin at one each. They may become negative, so that one layer is held against another. Saved in a
    sentence-transformers folder it becomes the stock ``WeightedLayerPooling`` and ``Pooling``.

    Args:
        layers: of the model; the states before the first layer are weighed too, so that there are ``layers + 1``.
        pooler: of the tokens, or its description; None: the mean.

    Raises:
        InputError: ``pooler`` does not read tokens, or states of another number of layers are given.

    Example:
        >>> import torch
        >>> from polyhead.pooling import WeightedLayersPooler
        >>> pooler = WeightedLayersPooler(1)                          # two kinds of states, weighed alike at first
        >>> pooler(torch.tensor([[[[1.0], [3.0]]]]), torch.ones(1, 1)).tolist()
        [[2.0]]
    """

    reads: ClassVar[Reads] = "layers"

    def __init__(self, layers: int, pooler: Pooler | dict[str, Any] | None = None) -> None:
        super().__init__()
        self.layers = layers
        self.pooler = MeanPooler() if pooler is None else pooler if isinstance(pooler, Pooler) else pooler_from(pooler)
        if self.pooler.reads != "tokens":
            raise InputError(f"{type(self.pooler).__name__} does not read tokens; give a pooler of the last layer.")
        self.weights = nn.Parameter(torch.ones(layers + 1))

    def forward(self, states: Tensor, mask: Tensor, skip: int | Tensor = 0, ids: Tensor | None = None) -> Tensor:
        """See :class:`Pooler`; states ``[batch, tokens, layers + 1, dim]``."""
        if states.dim() != 4 or states.shape[2] != self.layers + 1:
            raise InputError(
                f"States of shape {list(states.shape)} were given, expected [batch, tokens, {self.layers + 1}, dim]."
            )
        if states.dtype in (torch.float16, torch.bfloat16):
            states = states.float()
        weights = (self.weights / self.weights.sum()).to(states.dtype)
        return self.pooler((states * weights.unsqueeze(-1)).sum(2), mask, skip, ids)

    def output_dim(self, dim: int) -> int:
        """See :class:`Pooler`."""
        return self.pooler.output_dim(dim)

    def stock_modules(self, dim: int, include_prompt: bool = True) -> list[nn.Module] | None:
        """See :class:`Pooler`."""
        after = self.pooler.stock_modules(dim, include_prompt)
        if after is None:
            return None
        from sentence_transformers.sentence_transformer.modules import WeightedLayerPooling

        weights = nn.Parameter(self.weights.detach().clone())
        return [WeightedLayerPooling(dim, self.layers, layer_start=0, layer_weights=weights), *after]

    def settings(self) -> dict[str, Any]:
        """See :class:`Pooler`."""
        return {"layers": self.layers, "pooler": self.pooler.describe()}
