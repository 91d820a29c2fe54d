"""GGUF files read for their weights: without taking a vocabulary of a quarter of a million words apart, twice."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

__all__ = ["reading_weights"]

LARGE = 10_000
_LOCK = threading.Lock()


@contextmanager
def reading_weights() -> Iterator[None]:
    """While the block runs, transformers reads GGUF files for weights and configuration alone.

    Lists of more than 10,000 entries (a vocabulary, its scores and types) keep their length but not their content,
    and a file is taken apart once, not at each of transformers' calls. Does nothing where gguf is not installed. One
    block at a time: others wait.
    """
    try:
        import gguf
    except ImportError:
        yield
        return
    with _LOCK:
        stock, readers = gguf.GGUFReader, {}
        quick = _quick_reader(stock)

        def reader(path: Any, *mode: Any) -> Any:
            key = (str(path), *mode)
            if key not in readers:
                readers[key] = quick(path, *mode)
            return readers[key]

        gguf.GGUFReader = reader  # type: ignore[misc,assignment]
        try:
            yield
        finally:
            gguf.GGUFReader = stock  # type: ignore[misc]


def _quick_reader(stock: Any) -> Any:
    """A class like gguf's reader that steps over long lists."""
    from gguf import GGUFValueType

    class QuickReader(stock):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            value = GGUFValueType(int(kind[0]))
            scalar = self.gguf_scalar_to_np.get(value)
            if count[0] <= LARGE or (scalar is None and value != GGUFValueType.STRING):
                return super()._get_field_parts(orig_offs, raw_type)
            first, number = orig_offs + 12, int(count[0])
            if scalar is None:
                size = _strings_end(self.data, first, number) - first
                stand_in = np.frombuffer(b" ", np.uint8)
            else:
                size = number * np.dtype(scalar).itemsize
                stand_in = np.zeros(1, scalar)
            return 12 + size, [kind, count, stand_in], [2] * number, [GGUFValueType.ARRAY, value]

    return QuickReader


def _strings_end(data: np.ndarray, offset: int, count: int) -> int:
    """Where ``count`` strings end that begin at ``offset``, each after its length in 8 bytes."""
    held: memoryview = np.asarray(data).data
    for _ in range(count):
        offset += 8 + int.from_bytes(held[offset : offset + 8], "little")
    return offset
