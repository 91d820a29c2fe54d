"""Vectors of texts from whatever encodes them: Polyhead's encoder, a sentence-transformers model, a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from polyhead.errors import InputError

__all__ = ["Encodes", "name_of", "paired_cosine", "unit", "vectors"]

Encodes = Any
"""Anything with ``encode(texts)`` (and ``encode_query``, ``encode_document`` if it has them), or a function of texts;
it gives ``[n, dim]`` numbers, or an object that has them as ``dense``."""

Progress = Callable[[int, "int | None"], None]


def vectors(
    encoder: Encodes,
    texts: Sequence[str],
    *,
    side: Literal["", "query", "document"] = "",
    progress: Progress | None = None,
) -> np.ndarray:
    """Vectors ``[n, dim]`` of texts, each different text encoded once.

    Args:
        encoder: see :data:`Encodes`.
        texts: in any order.
        side: of a question or of a document, where the encoder tells them apart.
        progress: called with texts encoded and texts to encode, by an encoder that takes a ``progress``.

    Raises:
        InputError: something that does not encode, or gives other than one vector a text, or not numbers.
    """
    call = getattr(encoder, f"encode_{side}" if side else "encode", None) or getattr(encoder, "encode", encoder)
    if not callable(call):
        raise InputError(f"{type(encoder).__name__} does not encode: expected encode(texts), or a function of texts.")
    places = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    options = {"progress": progress} if progress is not None and _is_ours(encoder) else {}
    found = call(list(places), **options)
    rows = np.asarray(getattr(found, "dense", found))
    if rows.ndim != 2 or len(rows) != len(places):
        raise InputError(f"{len(places)} texts were encoded; expected [{len(places)}, dim] numbers, got {rows.shape}.")
    if not np.isfinite(rows).all():
        raise InputError(f"{name_of(encoder)} gives vectors with values that are not numbers.")
    return np.asarray(rows[[places[text] for text in texts]])


def _is_ours(encoder: Encodes) -> bool:
    from polyhead.embed import Encoder

    return isinstance(encoder, Encoder)


def name_of(encoder: Encodes) -> str:
    """What a report calls an encoder: its ``name``, a function's name, or its class."""
    return str(getattr(encoder, "name", None) or getattr(encoder, "__name__", None) or type(encoder).__name__)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of ``[n, dim]`` at length 1; zero vectors stay."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray(x / np.where(length > 0, length, 1.0))


def paired_cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine ``[n]`` of each row of ``a`` with the same row of ``b``, in float64; 0 where one is a zero vector."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    length = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / np.where(length > 0, length, 1.0))
