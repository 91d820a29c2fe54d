"""What tells queries and keys where they stand. One file a mechanism; each fits ``Attention(positions=...)``."""

from __future__ import annotations

from polyhead.positions.carope import ContextRotaryPositions, rate_maps
from polyhead.positions.rotary import RotaryPositions, rotate

__all__ = ["ContextRotaryPositions", "RotaryPositions", "rate_maps", "rotate"]
