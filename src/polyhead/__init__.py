"""Polyhead: the attention head as the unit.

``polyhead.load(model)`` finds the heads of any Hugging Face Transformer; ``polyhead.Encoder`` turns texts into
dense and per-head vectors; ``polyhead.Index`` keeps documents searchable, and ``polyhead.search_index`` asks it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from polyhead.embed import Encoder
    from polyhead.headmap import HeadMap
    from polyhead.model import HeadedModel, load
    from polyhead.search.engine import SearchResult, search_index
    from polyhead.search.index import Index

__all__ = ["Encoder", "HeadMap", "HeadedModel", "Index", "SearchResult", "__version__", "load", "search_index"]

_HOMES = {
    "Encoder": "polyhead.embed",
    "HeadMap": "polyhead.headmap",
    "HeadedModel": "polyhead.model",
    "Index": "polyhead.search.index",
    "SearchResult": "polyhead.search.engine",
    "load": "polyhead.model",
    "search_index": "polyhead.search.engine",
}


def __getattr__(name: str) -> Any:
    # Looked up on first use: importing polyhead must not import torch, which takes seconds.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'polyhead' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
