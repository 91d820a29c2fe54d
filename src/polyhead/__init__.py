"""Polyhead: the attention head as the unit.

``polyhead.load(model)`` finds the heads of any Hugging Face Transformer; ``polyhead.Encoder`` turns texts into
dense and per-head vectors; ``polyhead.search`` indexes and searches documents with them.
"""

from __future__ import annotations

__version__ = "0.1.0"
