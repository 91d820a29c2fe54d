"""The HTTP service: embeddings, reranking and search for programs, over one loaded encoder and one index."""

from __future__ import annotations

from polyhead.serve.app import create_app
from polyhead.serve.batching import Batcher, BusyError, SharedEncoder
from polyhead.serve.keys import KeyRing, RateLimit, add_key
from polyhead.serve.limits import Limits, is_loopback
from polyhead.serve.service import Service

__all__ = [
    "Batcher",
    "BusyError",
    "KeyRing",
    "Limits",
    "RateLimit",
    "Service",
    "SharedEncoder",
    "add_key",
    "create_app",
    "is_loopback",
]
