"""Batches by token budget: texts of like length together, so that little is spent on padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Batch", "token_batches"]


@dataclass(frozen=True)
class Batch:
    """Token sequences padded on the right to one length.

    Attributes:
        rows: ``[batch]`` int64, the index of each sequence in what was given.
        ids: ``[batch, tokens]`` int64.
        mask: ``[batch, tokens]`` int64, 1 for tokens and 0 for padding.
    """

    rows: np.ndarray
    ids: np.ndarray
    mask: np.ndarray


def token_batches(
    sequences: Sequence[np.ndarray], *, budget: int, pad_id: int, multiple: int = 8, limit: int | None = None
) -> Iterator[Batch]:
    """Batches of at most ``budget`` tokens, padding counted; a longer sequence gets a batch of its own.

    The longest come first: if memory does not suffice, that shows at once. Lengths are rounded up so that backends
    that compile for each shape meet few of them. Padding is always on the right: it is exact for causal and for
    masked bidirectional models, and absolute positions stay those of the text alone.

    Args:
        sequences: token ids, one array a text. Empty ones are left out, as a model cannot run on them.
        budget: tokens a batch.
        pad_id: id to fill up with.
        multiple: lengths are rounded up to a multiple of this.
        limit: the model's longest input, which rounding up must not pass.
    """
    lengths = np.fromiter((len(sequence) for sequence in sequences), dtype=np.int64, count=len(sequences))
    order = np.argsort(-lengths, kind="stable")[: int((lengths > 0).sum())]
    at = 0
    while at < len(order):
        longest = int(lengths[order[at]])
        width = -(-longest // multiple) * multiple
        if limit is not None:
            width = max(longest, min(width, limit))
        rows = order[at : at + max(1, budget // width)]
        at += len(rows)
        ids = np.full((len(rows), width), pad_id, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=np.int64)
        for line, row in enumerate(rows):
            ids[line, : lengths[row]] = sequences[row]
            mask[line, : lengths[row]] = 1
        yield Batch(rows, ids, mask)
