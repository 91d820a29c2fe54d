"""Knocking heads: one small map that every head passes through, so that heads learn from each other."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from polyhead.attention.base import Attention, Positions, Triple
from polyhead.attention.call import AttentionShape
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["KnockingHeadsAttention"]


@paper("kha")
class KnockingHeadsAttention(Attention):
    """Queries, keys or values of every head go through one ``T`` of ``[head_dim, head_dim]``, shared by all heads.

    It starts as plain attention: ``T`` is the identity. "mlp" changes values alone, by
    ``2 ((v W_up) * sigmoid(v W_gate)) W_down`` with ``W_up`` and ``W_down`` the identity and ``W_gate`` zero at first.

    Args:
        shape: widths.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        variant: "linear" or "mlp".
        parts: letters of what is changed by the linear one: "q", "k", "v".

    Raises:
        InputError: another variant, other letters, or "mlp" of anything but "v".

    Source:
        kha (arXiv 2510.23052).

    Example:
        >>> import torch
        >>> layer, hidden = KnockingHeadsAttention(AttentionShape(32, 4)), torch.randn(1, 5, 32)
        >>> bool(torch.allclose(layer(hidden), layer.fold()(hidden), atol=1e-5))
        True
    """

    name: ClassVar[str] = "kha"
    summary: ClassVar[str] = "All heads pass through one shared small map"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        variant: Literal["linear", "mlp"] = "linear",
        parts: str = "v",
    ) -> None:
        if (
            variant not in ("linear", "mlp")
            or not parts
            or set(parts) - set("qkv")
            or (variant == "mlp" and parts != "v")
        ):
            raise InputError(
                f"variant={variant!r} with parts={parts!r} was given; expected 'linear' with letters of 'qkv', or "
                "'mlp' with 'v'."
            )
        super().__init__(shape, causal=causal, positions=positions)
        self.variant = variant
        self.parts = parts
        self.maps = nn.ParameterDict()
        same = torch.eye(shape.size)
        if variant == "linear":
            for part in parts:
                self.maps[part] = same.clone()
        else:
            self.maps.update({"up": same.clone(), "gate": torch.zeros_like(same), "down": same.clone()})

    def project(self, hidden: torch.Tensor) -> Triple:
        """Queries, keys and values, knocked."""
        q, k, v = super().project(hidden)
        if self.variant == "mlp":
            return q, k, 2 * ((v @ self.maps["up"]) * (v @ self.maps["gate"]).sigmoid()) @ self.maps["down"]
        knocked = [
            each @ self.maps[part] if part in self.parts else each for part, each in zip("qkv", (q, k, v), strict=True)
        ]
        return knocked[0], knocked[1], knocked[2]

    def fold(self) -> Attention:
        """A plain layer of the same values, the maps taken into its projections: no cost at inference.

        Raises:
            InputError: the "mlp" variant, which is not linear.
        """
        if self.variant == "mlp":
            raise InputError("fold() was asked of variant='mlp', which is not linear; only 'linear' folds.")
        assert self.shape is not None
        made = Attention(self.shape, causal=self.causal, positions=self.positions)
        made.load_state_dict({name: each for name, each in self.state_dict().items() if not name.startswith("maps.")})
        made = made.to(self.o_proj.weight)
        with torch.no_grad():
            for part in self.parts:
                linear: nn.Linear = getattr(made, f"{part}_proj")
                knock = self.maps[part]
                linear.weight.copy_((knock.T @ linear.weight.unflatten(0, (-1, self.shape.size))).flatten(0, 1))
                if linear.bias is not None:
                    linear.bias.copy_((linear.bias.unflatten(0, (-1, self.shape.size)) @ knock).flatten())
        return made

    def mixing(self) -> dict[str, float]:
        """Share of each map's squared weight that lies off its diagonal: 0 at the start (but for a gate of zeros)."""
        found = {}
        for name, knock in self.maps.items():
            total = knock.detach().square().sum()
            found[name] = float(1 - knock.detach().diagonal().square().sum() / total) if total > 0 else 0.0
        return found
