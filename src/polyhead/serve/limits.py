"""What a service allows: sizes, counts, times, and where it listens."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from polyhead.errors import InputError

__all__ = ["Limits", "is_loopback"]


@dataclass(frozen=True)
class Limits:
    """Bounds of one service; what passes them is refused with a message that names the bound.

    Attributes:
        body_bytes: size of a request (413 above).
        inputs: texts of one request (422 above), as OpenAI's own service has it.
        characters: of one text (422 above).
        documents: of one request to rerank or to change the index.
        hits: of one search.
        waiting: texts in the queue (429 above).
        texts_at_once: of one forward pass.
        seconds: until a request is given up (503).
    """

    body_bytes: int = 8 << 20
    inputs: int = 2048
    characters: int = 1_000_000
    documents: int = 1000
    hits: int = 1000
    waiting: int = 4096
    texts_at_once: int = 256
    seconds: float = 120.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise InputError(f"The limit {name} is {value}; it must be above 0.")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a service that listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
