"""Gate heads: multiply each head's output by a number, 0 to switch it off, anything else to scale it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from polyhead.act.base import HeadAction, head_values
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Gate"]


@paper("sixteen-heads")
class Gate(HeadAction):
    """Head output times gate: ``z_h <- g_h z_h`` (Michel et al., sixteen-heads, equation of the mask variables xi).

    Args:
        gates: ``[layers, heads]``: a HeadMap, an array, or a tensor. A tensor that requires gradients is learned
            through. NaN leaves a head alone.

    Example:
        >>> import polyhead, torch
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> gates = torch.ones(model.layers, model.heads)
        >>> gates[5, 3] = 0
        >>> with Gate(gates).on(model), model.record("heads") as recording, torch.no_grad():
        ...     _ = model(**model.tokenize(["a head is off"]))
    """

    name: ClassVar[str] = "gate"
    summary: ClassVar[str] = "multiply head outputs: 0 switches a head off, 1 leaves it"

    def __init__(self, gates: HeadMap | np.ndarray | torch.Tensor) -> None:
        values = gates.values if isinstance(gates, HeadMap) else gates
        self.gates = torch.nan_to_num(torch.as_tensor(values), nan=1.0)

    @classmethod
    def off(cls, heads: Iterable[tuple[int, int]], model: HeadedModel) -> Gate:
        """Switch the given ``(layer, head)`` off, leave the others; ``HeadMap.top`` gives such a list.

        Raises:
            InputError: a head that the model does not have.
        """
        gates = torch.ones(model.layers, model.heads)
        for layer, head in heads:
            if not (0 <= layer < model.layers and 0 <= head < model.attention_layers[layer].heads):
                raise InputError(
                    f"Head {head} of layer {layer} was named; '{model.name}' has layers 0 to {model.layers - 1} with "
                    f"{model.heads} heads each."
                )
            gates[layer, head] = 0.0
        return cls(gates)

    def check(self, model: HeadedModel) -> None:
        """See :class:`HeadAction`."""
        head_values(self.gates, model, "gates")

    def change(self, layer: int, heads: torch.Tensor) -> torch.Tensor | None:
        """See :class:`HeadAction`."""
        gate = self.gates[layer, : heads.shape[-2]]
        if not gate.requires_grad and bool((gate == 1).all()):
            return None
        return heads * gate.to(heads.device, heads.dtype)[:, None]
