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
    """What a model takes, or stored vectors.

    Attributes:
        parameters: all of them, embeddings included.
        flops_per_token: multiplications and additions of linear layers, and of attention over ``context`` tokens.
        cache_bytes_per_token: what causal layers keep of a token, in the model's dtype; 0 for an encoder.
        context: tokens attended to.
        bytes_per_vector: of a stored vector; 0 where a model was transformed.
    """

    parameters: int = 0
    flops_per_token: int = 0
    cache_bytes_per_token: int = 0
    context: int = 0
    bytes_per_vector: float = 0.0


@dataclass(frozen=True)
class Report:
    """A transform's result, before and after. Every transform of this room returns one.

    Attributes:
        before, after: what it takes.
        removed: ``(layer, head)`` removed, in the numbers of the stock model.
        padded: those of them that keep their place with zero weights, see :mod:`polyhead.surgery`.
        parity: largest difference between the new model's output and what it ought to equal, relative to the largest
            output: the old model with the same heads gated to zero, or with the same weights shared, or the old model
            itself where the transform is exact. None where nothing is to be equal.
        quality: of a task before and after, where one was given; ``metric`` says which.
        interval: ``(low, high)`` 95% interval of the quality after, where it was measured example by example.
        change: difference between the outputs of the new model and the old one on random inputs, as a share of the
            old ones' length; None where nothing was compared.
        details: whatever else the transform has to say, plain values.
    """

    before: Cost
    after: Cost
    removed: list[tuple[int, int]] = field(default_factory=list)
    padded: list[tuple[int, int]] = field(default_factory=list)
    parity: float | None = None
    quality: tuple[float, float] | None = None
    metric: str = ""
    interval: tuple[float, float] | None = None
    change: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        before, after = asdict(self.before), asdict(self.after)
        lines = [
            f"{name.replace('_', ' ')}: {before[name]:,} -> {after[name]:,}"
            for name in before
            if before[name] != after[name]
        ]
        if self.parity is not None:
            lines.append(f"parity: {self.parity:.1e}")
        if self.change is not None:
            lines.append(f"change of the output: {self.change:.3f}")
        if self.quality is not None:
            within = "" if self.interval is None else f" ({self.interval[0]:.4f} to {self.interval[1]:.4f})"
            lines.append(f"{self.metric}: {self.quality[0]:.4f} -> {self.quality[1]:.4f}{within}")
        return "\n".join(lines)


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
            kept = getattr(layer.module, "cache_numbers_per_token", 2 * layer.kv_heads * layer.head_dim)
            cache += kept * model.dtype.itemsize
    parameters = sum(parameter.numel() for parameter in root.parameters())
    return Cost(parameters, round(counted["linear"] / max(1, counted["tokens"])) + attention, cache, context)
