"""API keys: hashed at rest, compared in constant time, each with its own rate limit."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyhead.errors import InputError

__all__ = ["KeyRing", "RateLimit", "add_key"]

PREFIX = "ph-"


@dataclass
class RateLimit:
    """A bucket of requests that fills steadily: ``per_minute`` of them a minute, and as many at once.

    Args:
        per_minute: requests; 0 for no limit.
        clock: seconds, rising.
    """

    per_minute: int
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._left, self._at = float(self.per_minute), self.clock()
        self._lock = threading.Lock()

    def take(self) -> float:
        """Count one request: 0.0 where it may pass, else the seconds until one may."""
        if self.per_minute == 0:
            return 0.0
        with self._lock:
            now = self.clock()
            self._left = min(self.per_minute, self._left + (now - self._at) * self.per_minute / 60)
            self._at = now
            if self._left >= 1:
                self._left -= 1
                return 0.0
            return (1 - self._left) * 60 / self.per_minute


class KeyRing:
    """The keys of a file that :func:`add_key` wrote. Keys are random and long, so SHA-256 is enough to hide them.

    Args:
        path: the file.

    Raises:
        InputError: no such file, or not one of keys.
    """

    def __init__(self, path: str | Path) -> None:
        entries = _read(Path(path))
        if not entries:
            raise InputError(f"{path} holds no keys. Make one with: polyhead serve --add-key NAME --keys {path}")
        self._keys = [(one["name"], bytes.fromhex(one["sha256"]), RateLimit(one["per_minute"])) for one in entries]

    def find(self, given: str) -> tuple[str, RateLimit] | None:
        """Name and rate limit of a key, None where there is none; looks at every key, found or not."""
        digest = hashlib.sha256(given.encode("utf-8", "surrogatepass")).digest()
        found = None
        for name, known, limit in self._keys:
            if hmac.compare_digest(known, digest):
                found = (name, limit)
        return found


def add_key(path: str | Path, name: str, per_minute: int = 0) -> str:
    """Make a key, keep its hash in the file (made where missing, readable by its owner alone), and give the key.

    Raises:
        InputError: a name that is there already, or a negative rate.
    """
    path = Path(path)
    entries = _read(path) if path.exists() else []
    if not name.strip() or any(one["name"] == name for one in entries):
        raise InputError(f"The key name {name!r} is {'there already' if name.strip() else 'empty'}; give another.")
    if per_minute < 0:
        raise InputError(f"The rate is {per_minute} requests a minute; expected 0 (no limit) or more.")
    key = PREFIX + secrets.token_urlsafe(32)
    entries.append({"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "per_minute": per_minute})
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        json.dump({"keys": entries}, file, indent=2)
    beside.replace(path)
    return key


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["keys"]
        for one in entries:
            if not (
                isinstance(one["name"], str) and len(bytes.fromhex(one["sha256"])) == 32 and one["per_minute"] >= 0
            ):
                raise ValueError(f"the entry {one.get('name')!r} is incomplete")
    except FileNotFoundError:
        raise InputError(
            f"There is no file of keys at {path}. Make a key with: polyhead serve --add-key NAME --keys {path}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as a file of keys ({error}); make it with --add-key.") from error
    return list(entries)
