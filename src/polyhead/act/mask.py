"""Learned gates: one number a head that training moves, between 0 and 1, with the price of every open head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from polyhead.act.base import HeadAction, head_values
from polyhead.act.gate import Gate
from polyhead.errors import InputError
from polyhead.headmap import HeadMap

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["LearnedGates"]

_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1  # temperature and stretch of the hard concrete distribution


class LearnedGates(nn.Module, HeadAction):
    """Gates with parameters, for any optimiser: put them on the model, add :meth:`penalty` to the loss, step.

    "hard-concrete" gates (Louizos et al. 2018, arXiv 1712.01312) are samples while in training mode, so that gates of
    exactly 0 and 1 occur and still have gradients; in evaluation mode they are fixed. "sigmoid" gates are soft and
    have no randomness.

    Args:
        layers, heads: of the model; :meth:`for_model` takes them from it.
        kind: "hard-concrete" or "sigmoid".
        start: the parameter's first value, the same for all heads; 2 opens them to 0.88 (sigmoid).

    Example:
        >>> import polyhead, torch
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> gates = LearnedGates.for_model(model)
        >>> with gates.on(model):
        ...     states = model(**model.tokenize(["train me"])).last_hidden_state
        >>> (states.pow(2).mean() + 0.1 * gates.penalty()).backward()
        >>> gates.logits.grad.shape
        torch.Size([6, 12])
    """

    name: ClassVar[str] = "learned-gates"
    summary: ClassVar[str] = "multiply head outputs by gates that training learns"

    def __init__(
        self,
        layers: int,
        heads: int,
        kind: Literal["hard-concrete", "sigmoid"] = "hard-concrete",
        start: float = 2.0,
    ) -> None:
        super().__init__()
        if kind not in ("hard-concrete", "sigmoid"):
            raise InputError(f"kind is {kind!r}, expected 'hard-concrete' or 'sigmoid'.")
        self.kind = kind
        self.logits = nn.Parameter(torch.full((layers, heads), float(start)))

    @classmethod
    def for_model(
        cls, model: HeadedModel, kind: Literal["hard-concrete", "sigmoid"] = "hard-concrete", start: float = 2.0
    ) -> LearnedGates:
        """Gates of a model's shape, on its device."""
        return cls(model.layers, model.heads, kind, start).to(model.device)

    def forward(self, layer: int | None = None) -> torch.Tensor:
        """Gates ``[layers, heads]``, or ``[heads]`` of one layer; a new sample each time in training mode."""
        logits = self.logits if layer is None else self.logits[layer]
        if self.kind == "sigmoid":
            return torch.sigmoid(logits)
        if self.training:
            uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
            logits = (torch.logit(uniform) + logits) / _BETA
        return (torch.sigmoid(logits) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    def penalty(self) -> torch.Tensor:
        """Expected share of open heads: the L0 norm of hard concrete gates, the mean of soft ones."""
        if self.kind == "sigmoid":
            return torch.sigmoid(self.logits).mean()
        return torch.sigmoid(self.logits - _BETA * math.log(-_GAMMA / _ZETA)).mean()

    def headmap(self, model: str = "", data: str = "") -> HeadMap:
        """The gates as they are in evaluation mode."""
        training = self.training
        self.eval()
        values = self.forward().detach().double().cpu().numpy()
        self.train(training)
        return HeadMap(values, self.name, model, data, "the head was kept open")

    def harden(self, threshold: float = 0.5) -> Gate:
        """Fixed gates: 1 above the threshold, else 0."""
        return Gate((self.headmap().values > threshold).astype(float))

    def check(self, model: HeadedModel) -> None:
        """See :class:`HeadAction`."""
        head_values(self.logits, model, "gates")

    def change(self, layer: int, heads: torch.Tensor) -> torch.Tensor | None:
        """See :class:`HeadAction`."""
        gate = self.forward(layer)[: heads.shape[-2]]
        return heads * gate.to(heads.device, heads.dtype)[:, None]
