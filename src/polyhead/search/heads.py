"""Per-head vectors as they are stored and compared: centred, unit-normalised per head, laid end to end."""

from __future__ import annotations

import numpy as np

from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["head_statistics", "prepare_heads"]


def prepare_heads(raw: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Centre, normalise per head and concatenate pooled head outputs.

    Args:
        raw: ``[n, layers, heads, head_dim]`` pooled head outputs of an encoder.
        mean: ``[layers, heads, head_dim]``, the index's mean head vectors.

    Returns:
        ``[n, layers * heads * head_dim]`` float32. The inner product of two rows is the sum over heads of their
        cosines, between ``-layers * heads`` and ``layers * heads``. A head equal to its mean stays zero.

    Raises:
        InputError: the shapes do not belong to the same layers and heads.
    """
    if raw.shape[1:] != mean.shape:
        raise InputError(
            f"Head vectors of shape {raw.shape[1:]} [layers, heads, head_dim] met an index of {mean.shape}. "
            "Encode with the model and layers the index was made with."
        )
    centred = raw.astype(np.float32) - mean.astype(np.float32)
    norms = np.linalg.norm(centred, axis=-1, keepdims=True)
    return (centred / np.maximum(norms, 1e-12)).reshape(len(raw), -1)


@paper("mrag")
def head_statistics(raw: np.ndarray, *, pairs: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Mean vector and Multi-Head RAG importance of each head (arXiv 2406.05085, section 2.2).

    Importance is the mean norm of a head's vectors times the mean cosine distance between random pairs of them, both
    on the vectors as the model gives them, not centred.

    Args:
        raw: ``[n, layers, heads, head_dim]`` pooled head outputs of a sample.
        pairs: how many random pairs to compare.
        seed: of the random pairs.

    Returns:
        mean ``[layers, heads, head_dim]`` float32 and importance ``[layers, heads]`` float32.
    """
    raw = raw.astype(np.float32)
    mean = raw.mean(0)
    norms = np.linalg.norm(raw, axis=-1)
    unit = raw / np.maximum(norms, 1e-12)[..., None]
    if len(raw) < 2:
        return mean, norms.mean(0)
    left, right = random_pairs(len(raw), pairs, seed)
    cosine = np.zeros(raw.shape[1:3], dtype=np.float64)
    for start in range(0, len(left), 2048):
        block = slice(start, start + 2048)
        cosine += (unit[left[block]] * unit[right[block]]).sum(axis=(0, -1), dtype=np.float64)
    return mean, (norms.mean(0) * (1.0 - cosine / len(left))).astype(np.float32)


def random_pairs(n: int, pairs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``pairs`` random pairs of different numbers below ``n`` (``n >= 2``), reproducible by ``seed``."""
    generator = np.random.default_rng(seed)
    left = generator.integers(0, n, pairs)
    right = (left + generator.integers(1, n, pairs)) % n
    return left, right
