"""Long texts as overlapping windows of tokens, cut between words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyhead.errors import InputError

__all__ = ["Chunk", "token_windows"]


@dataclass(frozen=True)
class Chunk:
    """One piece of a text, ready for the model.

    Attributes:
        ids: ``[tokens]``, special tokens and prompt included.
        start: first character of the piece in its text.
        end: one past the last character.
        weight: how many tokens of the text itself are in it.
    """

    ids: np.ndarray
    start: int
    end: int
    weight: int


def token_windows(words: Sequence[int | None], capacity: int, overlap: int) -> list[tuple[int, int]]:
    """Windows of about equal size that cover all tokens; each begins and ends between words where it can.

    Args:
        words: for each token, the number of its word. Neighbours of the same number are one word.
        capacity: most tokens in a window.
        overlap: tokens that neighbouring windows share (more where a word would be cut).

    Returns:
        ``(first, one past the last)`` token of each window.

    Raises:
        InputError: the overlap is negative or leaves no room for new tokens.

    Example:
        >>> token_windows([0, 1, 2, 3, 4, 5, 6], capacity=4, overlap=1)
        [(0, 4), (3, 7)]
    """
    if not 0 <= overlap < capacity:
        raise InputError(
            f"overlap = {overlap} tokens, expected 0 or more and less than the {capacity} that fit at once"
        )
    total = len(words)
    windows: list[tuple[int, int]] = []
    begin, covered = 0, 0
    while True:
        # Shared out anew each time, as whole words make windows shorter and would leave a crumb at the end.
        left = total - begin
        count = max(1, -(-(left - overlap) // (capacity - overlap)))
        size = -(-(left + (count - 1) * overlap) // count)
        end = max(begin + size, covered + 1)
        if end < total:
            # Past what is covered and past the overlap, or the windows after it would not get on.
            end = _word_start(words, end, least=max(covered, begin + overlap) + 1)
        windows.append((begin, end))
        if end == total:
            return windows
        # The next window must still reach new tokens, so its begin may not move back by more than its size.
        begin, covered = _word_start(words, end - overlap, least=max(begin + 1, end - size + 1)), end


def _word_start(words: Sequence[int | None], at: int, least: int) -> int:
    """The start of the word around token ``at``, or ``at`` itself where that start lies before ``least``."""
    start = at
    while start >= least and words[start] is not None and words[start] == words[start - 1]:
        start -= 1
    return start if start >= least else at
