"""Landmark pooling: a special token after every stretch of text, and the mean of these tokens' states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor, nn

from polyhead.embed.parts import split_parts
from polyhead.errors import InputError
from polyhead.papers.marks import paper
from polyhead.pooling.base import Pooler, weighted_sum

__all__ = ["LandmarkPooler", "Landmarks", "position_bias"]


@paper("lmk-pooling")
class Landmarks:
    """Puts landmark tokens into texts: ``[CLS] z1 [LMK] z2 [LMK] ... zn [LMK]`` (arXiv 2601.21525).

    The landmark is an existing special token, [SEP] where there is one, written into the text itself, so that every
    tokenizer of the model, here or elsewhere, sees it. A stretch never ends within a word: it is the interval or up
    to a word longer.

    Args:
        tokenizer: of the model, a fast one of transformers.
        interval: tokens of a stretch, "sentence", or the least and the largest of intervals drawn for each text, which
            is meant for training.
        landmark: another special token.
        seed: of the draws.

    Raises:
        InputError: no such token, or an interval below one token.

    Example:
        >>> from polyhead.model import load
        >>> from polyhead.pooling import Landmarks
        >>> Landmarks(load("all-MiniLM-L6-v2").tokenizer, interval=2).mark("Every head speaks for itself")
        'Every head [SEP] speaks for [SEP] itself'
    """

    def __init__(
        self,
        tokenizer: Any,
        interval: int | str | tuple[int, int] = 32,
        *,
        landmark: str | None = None,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.interval = tokenizer, interval
        self.landmark = landmark or tokenizer.sep_token or tokenizer.eos_token
        if self.landmark not in tokenizer.all_special_tokens:
            raise InputError(f"{self.landmark!r} is no special token; give one of {tokenizer.all_special_tokens}.")
        least = interval if isinstance(interval, int) else interval[0]
        if interval != "sentence" and (not isinstance(least, int) or least < 1):
            raise InputError(f"interval = {interval!r}, expected tokens, 'sentence', or two numbers to draw between.")
        self.id = int(tokenizer.convert_tokens_to_ids(self.landmark))
        self._generator = np.random.default_rng(seed)
        # Where the tokenizer ends texts with the token anyway, it is the last landmark.
        self._ends = tokenizer("a")["input_ids"][-1] == self.id

    def mark(self, text: str) -> str:
        """The text with its landmarks."""
        cuts = [0, *self._cuts(text), len(text)]
        marked = f" {self.landmark} ".join(text[start:end].strip() for start, end in pairwise(cuts))
        return marked if self._ends else f"{marked} {self.landmark}"

    def __call__(self, texts: Sequence[str], **options: Any) -> dict[str, Tensor]:
        """Marked texts as the model takes them, ``landmarks [batch, tokens]`` with 1 at each landmark beside.

        Args:
            texts: without landmarks.
            options: of the tokenizer, such as ``max_length``.
        """
        made = self.tokenizer(
            [self.mark(text) for text in texts], padding=True, truncation=True, return_tensors="pt", **options
        )
        marks = (made["input_ids"] == self.id) & (made["attention_mask"] != 0)
        return {**made, "landmarks": marks.to(made["attention_mask"].dtype)}

    def _cuts(self, text: str) -> list[int]:
        """Characters at which a stretch ends and another begins."""
        if self.interval == "sentence":
            return [part.start for part in split_parts(text, ("sentence",))[1:]]
        interval = self.interval
        if not isinstance(interval, int):
            interval = int(self._generator.integers(int(interval[0]), int(interval[1]) + 1))
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        words, starts = found.word_ids(), [start for start, _ in found["offset_mapping"]]
        cuts, since = [], 0
        for at in range(len(starts)):
            if since >= interval and words[at] != words[at - 1]:
                cuts.append(starts[at])
                since = 0
            since += 1
        return cuts


@paper("lmk-pooling")
class LandmarkPooler(Pooler):
    """The mean of the states of landmark tokens (arXiv 2601.21525). Texts get theirs from :class:`Landmarks`.

    Saved in a sentence-transformers folder it becomes the stock ``WordWeights``, which gives every other token the
    weight 0, and ``Pooling``; texts must be marked there too.

    Args:
        landmark: the token's id, :attr:`Landmarks.id`.
        vocabulary: of the model, how many tokens; needed for stock modules only.

    Raises:
        InputError: states without token ids.

    Example:
        >>> import torch
        >>> from polyhead.pooling import LandmarkPooler
        >>> states, ids = torch.tensor([[[1.0], [2.0], [9.0], [4.0]]]), torch.tensor([[101, 102, 7, 102]])
        >>> LandmarkPooler(102)(states, torch.ones(1, 4), ids=ids).tolist()
        [[3.0]]
    """

    knobs = ("landmark", "vocabulary")

    def __init__(self, landmark: int, vocabulary: int | None = None) -> None:
        super().__init__()
        self.landmark, self.vocabulary = landmark, vocabulary

    def among(self, counted: Tensor, ids: Tensor | None) -> Tensor:
        """See :class:`Pooler`."""
        if ids is None:
            raise InputError("Landmarks are found by token ids, and none were given: pass ids=.")
        return counted & (ids == self.landmark)

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`."""
        weights = counted.to(states.dtype)
        return weighted_sum(states, weights) / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)

    def stock_modules(self, dim: int, include_prompt: bool = True) -> list[nn.Module] | None:
        """See :class:`Pooler`. A prompt that is not pooled has no counterpart there."""
        if self.vocabulary is None or not include_prompt:
            return None
        from sentence_transformers.sentence_transformer.modules import Pooling, WordWeights

        # The stock module looks weights up by token id; the names of words only count.
        words = [str(number) for number in range(self.vocabulary)]
        return [WordWeights(words, {str(self.landmark): 1.0}, unknown_word_weight=0.0), Pooling(dim, "mean")]


def position_bias(
    encode: Callable[[list[str]], np.ndarray], query: str, needle: str, fillers: Sequence[str]
) -> np.ndarray:
    """How near a query is to a long text, as one sentence of it moves from the beginning to the end.

    Args:
        encode: texts to vectors ``[n, dim]``.
        query: what the sentence answers.
        needle: the sentence.
        fillers: the other sentences, in order.

    Returns:
        Cosines ``[len(fillers) + 1]``, by the number of fillers before the needle. A pooling without bias gives equal
        ones.
    """
    texts = [" ".join([*fillers[:at], needle, *fillers[at:]]) for at in range(len(fillers) + 1)]
    found = np.asarray(encode([query, *texts]), dtype=np.float64)
    unit = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
    return unit[1:] @ unit[0]
