"""Needles: a short fact hidden in a long text, and a question at the end that can be answered by copying it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from polyhead.errors import InputError

__all__ = ["NeedlePrompt", "Needles"]

_THINGS = ("password", "code word", "secret phrase", "key phrase")
_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
_ANIMALS = ("fox", "tiger", "horse", "eagle", "turtle", "rabbit", "whale", "bear", "wolf", "owl")
_WORDS: tuple[str, ...] = ("lamp", "river", "stone", "candle", "garden", "window", "bridge", "mirror", "carpet")
_WORDS += ("bottle", "basket", "ladder", "pencil", "ticket", "blanket", "hammer", "guitar", "pepper", "button")
_WORDS += ("saddle", "helmet", "feather", "pillow", "anchor", "mango", "violin", "lemon", "wagon")


@dataclass(frozen=True)
class NeedlePrompt:
    """One prompt.

    Attributes:
        prompt: token ids: the text with the needle in it, then the question.
        answer: token ids that should follow.
        needle: ``(first, last + 1)``: where in the prompt the answer stands.
        length: tokens of the text around the needle.
        depth: share of that text which stands before the needle.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    needle: tuple[int, int]
    length: int = 0
    depth: float = 0.0

    def __post_init__(self) -> None:
        first, end = self.needle
        if not 0 <= first < end < len(self.prompt) or not self.answer:
            raise InputError(
                f"The needle lies at tokens {first} to {end} of a prompt of {len(self.prompt)}, with an answer of "
                f"{len(self.answer)} tokens; expected a needle inside the prompt, before its last token, and an answer."
            )


@dataclass(frozen=True)
class Needles:
    """Prompts with needles in them.

    Example:
        >>> import polyhead
        >>> from polyhead.data import load_texts
        >>> model = polyhead.load("gemma-3-270m", lm_head=True)
        >>> needles = Needles.build(model.tokenizer, load_texts("ag-news", 400), lengths=(256,), depths=(0.5,))
        >>> model.tokenizer.decode(needles.prompts[0].prompt[-8:])
        '\\nThe password of the blue eagle is'
    """

    prompts: tuple[NeedlePrompt, ...]
    name: str = "needles"

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("Needles were given no prompts; expected at least one.")

    def __len__(self) -> int:
        return len(self.prompts)

    @classmethod
    def build(
        cls,
        tokenizer: Any,
        texts: Sequence[str],
        *,
        lengths: Sequence[int] = (256, 512),
        depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
        each: int = 1,
        name: str = "ag-news",
        seed: int = 0,
    ) -> Needles:
        """Needles of the form "The password of the red fox is lamp river stone.", asked for by their beginning.

        Args:
            tokenizer: of the model.
            texts: to hide them in, chosen and ordered at random for every prompt.
            lengths: tokens of text around the needle, each exactly.
            depths: where it is put, 0 (beginning) to 1 (end), at the nearest boundary between two texts.
            each: prompts for every length and depth.
            name: of the texts.
            seed: of texts and needles.

        Raises:
            InputError: fewer tokens of text than the longest prompt needs, or a depth outside 0 to 1.
        """
        if any(not 0 <= depth <= 1 for depth in depths) or min(lengths, default=0) < 1:
            raise InputError(f"lengths {tuple(lengths)} and depths {tuple(depths)} were given; depths are 0 to 1.")
        random = np.random.default_rng(seed)
        prompts = [
            _prompt(tokenizer, texts, length, depth, random)
            for length, depth, _ in product(lengths, depths, range(each))
        ]
        spread = f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, seed {seed}"
        return cls(tuple(prompts), f"needles in {name} ({spread})")


def _prompt(
    tokenizer: Any, texts: Sequence[str], length: int, depth: float, random: np.random.Generator
) -> NeedlePrompt:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    pieces: list[list[int]] = []
    for i in random.permutation(len(texts)):
        if (room := length - sum(map(len, pieces))) <= 0:
            break
        pieces.append(ids(texts[i] + "\n")[:room])
    held = sum(map(len, pieces))
    if held < length:
        raise InputError(f"A prompt of {length} tokens needs more text: the {len(texts)} texts given hold {held}.")
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    words = " ".join(random.choice(_WORDS, 3, replace=False))
    thing, colour, animal = (str(random.choice(kind)) for kind in (_THINGS, _COLOURS, _ANIMALS))
    question, answer = ids(f"\nThe {thing} of the {colour} {animal} is"), ids(f" {words}")
    ends = np.cumsum([0, *map(len, pieces)])
    cut = int(np.abs(ends - depth * length).argmin())
    before = [token for piece in pieces[:cut] for token in piece]
    after = [token for piece in pieces[cut:] for token in piece]
    first = len(begin) + len(before) + len(question)
    prompt = [*begin, *before, *question, *answer, *ids(".\n"), *after, *question]
    return NeedlePrompt(tuple(prompt), tuple(answer), (first, first + len(answer)), length, float(ends[cut] / length))
