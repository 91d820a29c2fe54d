"""Rescale what heads attend to: the attention on a span is multiplied, head by head."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from polyhead.act.attention import AttentionAction, Run, Span, span_mask
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.papers import paper

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from polyhead.model import HeadedModel

__all__ = ["RescaleAttention"]


@paper("hrv")
class RescaleAttention(AttentionAction):
    """Attention on a span times a number for each head; rows need not sum to 1 any more (hrv, concept rescaling).

    With a concept's map it strengthens the concept, with the difference of two maps it turns one reading into the
    other, with -2 it weakens.

    Args:
        span: tokens, see :func:`polyhead.act.attention.span_mask`.
        factors: ``[layers, heads]``; NaN leaves a head alone.

    Example:
        >>> import numpy as np, polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> with RescaleAttention((1, 3), np.full((6, 12), 2.0)).on(model):
        ...     _ = model(**model.tokenize(["look here twice"]))
    """

    name: ClassVar[str] = "rescale-attention"
    summary: ClassVar[str] = "multiply the attention on chosen tokens, head by head"

    def __init__(self, span: Span, factors: HeadMap | np.ndarray | torch.Tensor) -> None:
        super().__init__()
        values = factors.values if isinstance(factors, HeadMap) else factors
        self.span, self.factors = span, torch.nan_to_num(torch.as_tensor(values), nan=1.0).float()

    def on(self, model: HeadedModel) -> AbstractContextManager[None]:
        """See :class:`AttentionAction`.

        Raises:
            InputError: factors of another shape than the model's.
        """
        if tuple(self.factors.shape) != (model.layers, model.heads):
            raise InputError(
                f"The factors have the shape {list(self.factors.shape)}; '{model.name}' has {model.layers} layers x "
                f"{model.heads} heads, so one factor for each is expected."
            )
        return super().on(model)

    def reweigh(self, layer: int, weights: torch.Tensor, run: Run) -> torch.Tensor | None:
        """See :class:`AttentionAction`."""
        factors = self.factors[layer, : weights.shape[1]].to(weights.device)
        if bool((factors == 1).all()):
            return None
        inside = span_mask(self.span, weights)[:, None, None]
        return torch.where(inside, weights * factors[:, None, None], weights)
