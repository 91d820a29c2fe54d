"""What a transform saved and what it cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from polyhead.structure import is_linear, probe_inputs

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Cost", "Report", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """What a model takes.

    Attributes:
        parameters: all of them, embeddings included.
        flops_per_token: multiplications and additions of linear layers, and of attention over ``context`` tokens.
        cache_bytes_per_token: keys and values of causal layers, in the model's dtype; 0 for an encoder.
        context: tokens attended to.
    """

    parameters: int
    flops_per_token: int
    cache_bytes_per_token: int
    context: int


@dataclass(frozen=True)
class Report:
    """A transform's result, before and after.

    Attributes:
        before, after: what the model takes.
        removed: ``(layer, head)`` removed, in the numbers of the stock model.
        padded: those of them that keep their place with zero weights, see :mod:`polyhead.surgery`.
        parity: largest difference between the new model's output and the old one's with the same heads gated to
            zero, relative to the largest output.
        quality: of a task before and after, where one was given; ``metric`` says which.
    """

    before: Cost
    after: Cost
    removed: list[tuple[int, int]]
    padded: list[tuple[int, int]]
    parity: float
    quality: tuple[float, float] | None = None
    metric: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def cost_of(model: HeadedModel, context: int = 128) -> Cost:
    """Count a model's parameters, work and cache; convolutions and embeddings' lookups are not counted as work."""
    root = model.module
    counted = {"linear": 0, "tokens": 0}

    def linear(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        inside = weight.shape[0] if hasattr(module, "nf") else weight.shape[1]
        counted["linear"] += 2 * weight.numel() * (args[0].numel() // max(1, inside))

    def heads(layer: int, z: torch.Tensor) -> None:
        counted["tokens"] = z.numel() // max(1, z.shape[-1] * z.shape[-2])

    handles = [module.register_forward_pre_hook(linear) for module in root.modules() if is_linear(module)]
    try:
        with model.tap_heads(heads), torch.no_grad():
            root(**probe_inputs(root))
    finally:
        for handle in handles:
            handle.remove()
    attention = cache = 0
    for layer in model.attention_layers:
        seen = min(context, layer.sliding_window or context)
        attention += 4 * seen * layer.heads * layer.head_dim
        if getattr(layer.module, "is_causal", False):
            cache += 2 * layer.kv_heads * layer.head_dim * model.dtype.itemsize
    parameters = sum(parameter.numel() for parameter in root.parameters())
    return Cost(parameters, round(counted["linear"] / max(1, counted["tokens"])) + attention, cache, context)
