"""Attention mechanisms, one file each, all of one contract: :class:`Attention`."""

from __future__ import annotations

import importlib
import pkgutil

from polyhead.attention.base import Attention, repeat_groups
from polyhead.attention.call import AttentionShape, Call, State
from polyhead.attention.grouped import GroupedQueryAttention
from polyhead.attention.linear import LinearAttention, causal_linear
from polyhead.attention.qk_norm import QKNormAttention
from polyhead.attention.stock import register, replaced

__all__ = [
    "Attention",
    "AttentionShape",
    "Call",
    "GroupedQueryAttention",
    "LinearAttention",
    "QKNormAttention",
    "State",
    "causal_linear",
    "mechanisms",
    "register",
    "repeat_groups",
    "replaced",
]


def mechanisms() -> dict[str, type[Attention]]:
    """Every mechanism of this room by its name; a file that appears here is found."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    found: dict[str, type[Attention]] = {}
    waiting: list[type[Attention]] = [Attention]
    while waiting:
        kind = waiting.pop()
        waiting += kind.__subclasses__()
        if kind.__module__.startswith(__name__):
            found[kind.name] = kind
    return dict(sorted(found.items()))
