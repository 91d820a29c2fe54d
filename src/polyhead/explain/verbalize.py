"""Token scores in words: search for what is worth saying, say it in sentences, and check what sentences say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from polyhead.errors import InputError
from polyhead.explain.base import Attribution
from polyhead.explain.statements import Check, Statement, check_claims, phrases, places, read_claims, share, speakable
from polyhead.papers import paper

__all__ = [
    "Candidate",
    "Verbalization",
    "conv_search",
    "instruction",
    "span_search",
    "top_k_search",
    "verbalize",
    "verbalize_by",
]

Method = Literal["topk", "span", "conv", "order"]
_METHODS = ("topk", "span", "conv", "order")
TEMPLATES: dict[str, str] = {
    "topk": "{The words} {words} {are} most important for {target} ({share}% of all attribution).",
    "span": "The phrase {words} is the most important one of its length ({share}%).",
    "conv": "Close together, {words} also {matter} ({share}%).",
    "order": "From most to least important: {words}.",
}
"""A sentence for each method; a template of your own may use the same fields."""
_OPENING = 'The most important word is "'


@dataclass(frozen=True)
class Candidate:
    """Tokens that may be worth a sentence.

    Attributes:
        positions: in the text, ascending; by importance for an order.
        coverage: their summed scores as a share of the sum of all absolute scores.
        method: of the search.
    """

    positions: tuple[int, ...]
    coverage: float
    method: Method


@dataclass
class Verbalization:
    """Sentences about an attribution.

    Attributes:
        text: as people read it.
        claims: what it says, statement by statement.
        check: which of that holds.
    """

    text: str
    claims: list[Statement]
    check: Check = field(repr=False)


def span_search(attribution: Attribution, width: int = 4, *, quantile: float | None = None) -> list[Candidate]:
    """Runs of 2 to ``width`` tokens whose mean score is above the threshold, highest coverage first.

    Args:
        attribution: by words, see :meth:`Attribution.words`.
        width: of the longest run.
        quantile: of the scores that the mean of a run has to exceed; None takes the mean of all scores.

    Raises:
        InputError: a width below 2, or a quantile outside 0 to 1.
    """
    limit = _threshold(attribution, width, quantile)
    found = [
        Candidate(run, share(attribution, run), "span")
        for length in range(2, width + 1)
        for run in phrases(attribution, length)
        if attribution.scores[list(run)].mean() > limit
    ]
    return _by_coverage(found)


def conv_search(
    attribution: Attribution, width: int = 5, size: int = 3, *, quantile: float | None = None
) -> list[Candidate]:
    """Words close together: a window of ``width`` tokens slides over the text and keeps its ``size`` best words.

    The window's binary filter is the one with the largest sum, so words between may be left out.

    Args:
        attribution: by words.
        width: of the window.
        size: words kept in it.
        quantile: of the scores that the mean of the kept words has to exceed; None takes the mean of all scores.

    Raises:
        InputError: a width below 2 or below ``size``, or a quantile outside 0 to 1.
    """
    limit = _threshold(attribution, width, quantile)
    if not 2 <= size <= width:
        raise InputError(f"conv_search was given size={size} and width={width}; expected 2 <= size <= width.")
    words = speakable(attribution)
    seen: dict[tuple[int, ...], Candidate] = {}
    for first in range(max(1, len(attribution) - width + 1)):
        window = [i for i in range(first, min(first + width, len(attribution))) if words[i]]
        if len(window) < size:
            continue
        best = sorted(window, key=lambda i: -attribution.scores[i])[:size]
        kept = tuple(sorted(best))
        if attribution.scores[best].mean() > limit:
            seen[kept] = Candidate(kept, share(attribution, kept), "conv")
    return _by_coverage(list(seen.values()))


def top_k_search(attribution: Attribution, k: int = 3) -> list[Candidate]:
    """The ``k`` highest-scored words as one candidate; none where no word has a score above 0."""
    values = np.where(speakable(attribution), attribution.scores, -np.inf)
    best = [int(i) for i in np.argsort(-values, kind="stable")[:k] if values[i] > 0]
    if not best:
        return []
    kept = tuple(sorted(best))
    return [Candidate(kept, share(attribution, kept), "topk")]


@paper("saliency-verbalization")
def verbalize(
    attribution: Attribution,
    methods: Sequence[Method] = ("topk", "span", "conv"),
    *,
    k: int = 3,
    width: int = 4,
    quantile: float | None = None,
    templates: dict[str, str] | None = None,
) -> Verbalization:
    """Token scores in sentences, each of which is true of the scores by construction.

    Every method searches its candidates; the best by coverage are put into a sentence each, unless they only repeat
    the words of a sentence before.

    Args:
        attribution: by words, see :meth:`Attribution.words`.
        methods: of "topk" (the k best words), "span" (the best run of words), "conv" (words close together) and
            "order" (the k best words in their order); the sentences come in this order.
        k: words of "topk" and "order".
        width: of spans; windows of "conv" are one wider.
        quantile: threshold of the searches; None takes the mean.
        templates: in place of the sentences of :data:`TEMPLATES`.

    Raises:
        InputError: an unknown method, or an attribution without a score.

    Example:
        >>> scores = Attribution("the striker scored a late goal".split(), [0, 0.3, 0.2, 0, 0.1, 0.4], "Sports")
        >>> print(verbalize(scores, ["topk"], k=2).text)
        The words “striker” and “goal” are most important for Sports (70% of all attribution).
    """
    unknown = [name for name in methods if name not in _METHODS]
    if unknown or not methods:
        raise InputError(f"verbalize was given methods {list(methods)}; expected some of {', '.join(_METHODS)}.")
    if not attribution.judged.any():
        raise InputError("No token of this attribution has a score, so there is nothing to say.")
    said: list[set[int]] = []
    sentences: list[str] = []
    for method in methods:
        for candidate in _search(method, attribution, k, width, quantile):
            if method == "order" or set(candidate.positions) not in said:
                said.append(set(candidate.positions))
                sentences.append(_sentence(candidate, attribution, {**TEMPLATES, **(templates or {})}))
                break
    text = " ".join(sentences) or f"No word stands out for {attribution.target}."
    claims = read_claims(text, attribution)
    return Verbalization(text, claims, check_claims(claims, attribution))


def _search(method: Method, attribution: Attribution, k: int, width: int, quantile: float | None) -> list[Candidate]:
    if method == "span":
        best: dict[int, Candidate] = {}  # only the best of its length is called the most important
        for one in span_search(attribution, width, quantile=quantile):
            best.setdefault(len(one.positions), one)
        return [one for one in best.values() if _clear(one, attribution)]
    if method == "conv":
        found = conv_search(attribution, width + 1, min(3, width), quantile=quantile)
        mean = float(np.nanmean(attribution.scores))
        above = [one for one in found if attribution.scores[list(one.positions)].mean() > mean]
        return [one for one in above if _clear(one, attribution)]
    found = top_k_search(attribution, k)
    if method == "topk" or not found:
        return found
    ordered = sorted(found[0].positions, key=lambda i: -attribution.scores[i])
    return [Candidate(tuple(ordered), found[0].coverage, "order")] if len(ordered) > 1 else []


def _clear(candidate: Candidate, attribution: Attribution) -> bool:
    """Whether a reader who looks for the words finds these, not the same words where they count for more."""
    words = [attribution.tokens[i] for i in candidate.positions]
    read = places([" ".join(words)] if candidate.method == "span" else words, attribution)
    return candidate.coverage > 0 and {i for place in read for i in place} == set(candidate.positions)


def _sentence(candidate: Candidate, attribution: Attribution, templates: dict[str, str]) -> str:
    words = [attribution.tokens[i] for i in candidate.positions]
    together = [" ".join(words)] if candidate.method == "span" else words
    quoted = [f"“{word}”" for word in together]
    several = len(quoted) > 1
    listed = f"{', '.join(quoted[:-1])} and {quoted[-1]}" if several else quoted[0]
    return templates[candidate.method].format_map(
        {
            "The words": "The words" if several else "The word",
            "are": "are" if several else "is",
            "matter": "matter" if several else "matters",
            "words": ", ".join(quoted) if candidate.method == "order" else listed,
            "target": attribution.target or "the prediction",
            "share": f"{100 * candidate.coverage:.0f}",
        }
    )


def instruction(attribution: Attribution, task: str) -> str:
    """A prompt that asks a language model to put the scores into words."""
    pairs = "\n".join(
        f"{token}: {score:.2f}" for token, score in zip(attribution.tokens, attribution.scores, strict=True)
    )
    return (
        f"A classifier was given a text. Its task: {task}. It answered: {attribution.target}.\n"
        f"How much each word of the text counted for that answer:\n{pairs}\n"
        "Say in two sentences which words were most important for the answer. Put words of the text in double quotes "
        f"and give their scores.\nExplanation: {_OPENING}"
    )


@paper("saliency-verbalization")
def verbalize_by(backend: Callable[[str], str], attribution: Attribution, task: str) -> Verbalization:
    """Token scores in the words of a language model, with what it says checked.

    Args:
        backend: takes the prompt, which ends with an opened quotation mark, and gives what the model goes on with.
        attribution: by words.
        task: of the explained model, such as "name the topic of a news item".
    """
    text = _OPENING + backend(instruction(attribution, task)).strip()
    claims = read_claims(text, attribution)
    return Verbalization(text, claims, check_claims(claims, attribution))


def _threshold(attribution: Attribution, width: int, quantile: float | None) -> float:
    if width < 2 or (quantile is not None and not 0 <= quantile <= 1):
        raise InputError(
            f"A search was given width={width} and quantile={quantile}; expected at least 2 tokens and a quantile "
            "between 0 and 1, or none for the mean."
        )
    known = attribution.scores[attribution.judged]
    if len(known) == 0:
        return 0.0
    return float(known.mean() if quantile is None else np.quantile(known, quantile))


def _by_coverage(found: list[Candidate]) -> list[Candidate]:
    return sorted(found, key=lambda one: (-one.coverage, len(one.positions), one.positions))
