"""Key-value caches with a budget for each head. One policy a file; each builds a transformers ``Cache``."""

from __future__ import annotations

from polyhead.cache.base import CachePolicy, HeadCache, kv_scores
from polyhead.cache.head_kv import HeadKVPolicy, allocate_budget
from polyhead.cache.razor import RazorPolicy
from polyhead.cache.storage import HeadCacheLayer, Look
from polyhead.cache.window import WindowPolicy, protected_heads, recent_and_sinks

__all__ = [
    "CachePolicy",
    "HeadCache",
    "HeadCacheLayer",
    "HeadKVPolicy",
    "Look",
    "RazorPolicy",
    "WindowPolicy",
    "allocate_budget",
    "kv_scores",
    "protected_heads",
    "recent_and_sinks",
]
