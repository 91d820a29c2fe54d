"""What a text says about token scores, statement by statement, and whether it is true."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from polyhead.explain.base import Attribution
from polyhead.papers import paper

__all__ = ["Check", "Statement", "check_claims", "phrases", "places", "read_claims", "share", "speakable"]

Says = Literal["most important", "important", "unimportant", "order"]
_QUOTED = re.compile('“([^”]+)”|"([^"]+)"|«([^»]+)»')
_NUMBER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*(%|percent\b)?(?![\w])")
_CLAUSE = re.compile(r"(?<=[.!?;])\s+|\n+|,?\s+(?:while|whereas|but|although|though)\s+", re.I)
_ORDER = re.compile(r"\b(from most to least|in order of)\b", re.I)
_MOST = re.compile(r"\b(most (important|salient|influential|relevant)|matters? (the )?most|strongest)\b", re.I)
_LITTLE = re.compile(r"\b(not (important|relevant|salient)|unimportant|irrelevant|least|do(es)? not matter)\b", re.I)


@dataclass(frozen=True)
class Statement:
    """One thing that a text says about token scores.

    Attributes:
        words: quoted, each a word or a run of words.
        says: how important they are called.
        percent: of all attribution that they are said to have, and its last digit's half: ``(62.0, 0.5)``; or None.
        score: that a single word is said to have, and its last digit's half; or None.
    """

    words: tuple[str, ...]
    says: Says
    percent: tuple[float, float] | None = None
    score: tuple[float, float] | None = None


@dataclass(frozen=True)
class Check:
    """Which statements hold.

    Attributes:
        truths: one a statement.
        reasons: what is wrong with each, empty where it holds.
    """

    truths: list[bool]
    reasons: list[str]

    @property
    def faithfulness(self) -> float:
        """Share of the statements that hold; NaN where nothing is said."""
        return float(np.mean(self.truths)) if self.truths else float("nan")


def speakable(attribution: Attribution) -> np.ndarray:
    """Boolean ``[n]``: tokens with a score, a letter or digit, and no typographic quotation mark."""
    known = [any(c.isalnum() for c in token) and not set(token) & set("“”") for token in attribution.tokens]
    return np.array(known, dtype=bool) & attribution.judged


def phrases(attribution: Attribution, length: int) -> list[tuple[int, ...]]:
    """Runs of ``length`` judged tokens that begin and end with a word, by their positions."""
    words, judged = speakable(attribution), attribution.judged
    marks = np.array([bool(set(token) & set('“”"«»')) for token in attribution.tokens])
    found = []
    for first in range(len(attribution) - length + 1):
        run = list(range(first, first + length))
        if words[run[0]] and words[run[-1]] and judged[run].all() and not marks[run].any():
            found.append(tuple(run))
    return found


def share(attribution: Attribution, positions: Sequence[int]) -> float:
    """Summed scores of some tokens as a share of the sum of all absolute scores; 0 where all scores are 0."""
    total = float(np.nansum(np.abs(attribution.scores)))
    return float(attribution.scores[list(positions)].sum()) / total if total > 0 else 0.0


def read_claims(text: str, attribution: Attribution) -> list[Statement]:
    """What a text says about the scores: every quoted word, with the numbers and the ranking said of it.

    Quoted words with no number between them are one statement; a number ends it. A word that is quoted at all is taken
    to be called important, unless the clause says that it is not. The target's own name is no
    statement, unless it is a word of the text.

    Args:
        text: of sentences; words of the explained text in quotation marks.
        attribution: by words.

    Example:
        >>> scores = Attribution(["late", "goal"], [0.1, 0.4], "Sports")
        >>> read_claims('The word "goal" is most important (80%).', scores)
        [Statement(words=('goal',), says='most important', percent=(80.0, 0.5), score=None)]
    """
    quotes: list[str] = []

    def put_away(found: re.Match[str]) -> str:
        quotes.append(next(group for group in found.groups() if group).strip())
        return f"\x00{chr(0xE000 + len(quotes) - 1)}\x00"

    hidden = _QUOTED.sub(put_away, text)
    own = {attribution.target.lower()} - {token.lower() for token in attribution.tokens}
    statements: list[Statement] = []
    for clause in _CLAUSE.split(hidden):
        statements += _of_clause(clause, quotes, own)
    return statements


def _of_clause(clause: str, quotes: list[str], own: set[str]) -> list[Statement]:
    plain = re.sub("\x00.\x00", " ", clause)
    marks = [(m.start(), quotes[ord(m[0][1]) - 0xE000]) for m in re.finditer("\x00.\x00", clause)]
    marks = [(at, word) for at, word in marks if word and word.lower() not in own]
    numbers = [m for m in _NUMBER.finditer(clause) if m[2] or "." in m[1]]
    found: list[Statement] = []
    begin = 0
    for end, number in [*((m.end(), m) for m in numbers), (len(clause) + 1, None)]:
        words = tuple(word for at, word in marks if begin <= at < end)
        begin = end
        if not words:
            continue
        says: Says = "important"
        if _LITTLE.search(plain) and not _ORDER.search(plain):
            says = "unimportant"
        elif not found and _ORDER.search(plain):
            says = "order"
        elif not found and _MOST.search(plain):  # "most" is said of the first group of a clause
            says = "most important"
        found.append(_statement(words, says, number))
    return found


def _statement(words: tuple[str, ...], says: Says, number: re.Match[str] | None) -> Statement:
    if number is None:
        return Statement(words, says)
    value = (float(number[1]), 0.5 * 10.0 ** -len(number[1].partition(".")[2]))
    if number[2]:
        return Statement(words, says, percent=value)
    return Statement(words, says, score=value if len(words) == 1 else None)


@paper("saliency-verbalization")
def check_claims(claims: Sequence[Statement], attribution: Attribution, *, tolerance: float = 0.0) -> Check:
    """Whether statements about token scores are true of them.

    - Words have to stand in the text; of several places the highest-scored is meant.
    - "most important": no other words, as many, have a larger sum; of a run, no other run of its length.
    - "important" means a mean score above that of all tokens, "unimportant" at most that.
    - "order": scores do not rise from word to word.
    - A percentage is that of the words' summed scores in all absolute scores, a score that of the one word, to the
      last digit given.

    Args:
        claims: of :func:`read_claims`.
        attribution: by words.
        tolerance: of percentages, in points, beyond rounding; a hundredth of it for scores.

    Example:
        >>> scores = Attribution(["late", "goal"], [0.1, 0.4], "Sports")
        >>> check_claims(read_claims('"late" is the most important word.', scores), scores).reasons
        ['other words have a larger sum']
    """
    reasons = [_wrong(claim, attribution, tolerance) for claim in claims]
    return Check([not reason for reason in reasons], reasons)


def _wrong(claim: Statement, attribution: Attribution, tolerance: float) -> str:
    groups = places(claim.words, attribution)
    missing = [word for word, group in zip(claim.words, groups, strict=True) if not group]
    if missing:
        return f"not in the text: {', '.join(missing)}"
    positions = sorted({i for group in groups for i in group})
    wrong = _wrong_rank(claim.says, groups, positions, attribution)
    if claim.percent is not None:
        real = 100 * share(attribution, positions)
        if abs(real - claim.percent[0]) > claim.percent[1] + tolerance + 1e-9:
            wrong.append(f"{claim.percent[0]:g}% is said, {real:.1f}% is right")
    if claim.score is not None:
        real = float(attribution.scores[positions].sum())
        if abs(real - claim.score[0]) > claim.score[1] + tolerance / 100 + 1e-9:
            wrong.append(f"{claim.score[0]:g} is said, {real:.3g} is right")
    return "; ".join(wrong)


def _wrong_rank(says: Says, groups: list[tuple[int, ...]], positions: list[int], attribution: Attribution) -> list[str]:
    scores, tiny = attribution.scores, 1e-12
    if says == "order":
        each = [float(scores[list(group)].sum()) for group in groups]
        return [] if all(a >= b - tiny for a, b in pairwise(each)) else ["the order is another"]
    if says == "most important":
        if len(groups) == 1 and len(groups[0]) > 1:
            runs = [*phrases(attribution, len(groups[0])), groups[0]]
            best = max(float(scores[list(run)].sum()) for run in runs)
        else:
            best = float(np.sort(scores[speakable(attribution)])[::-1][: len(positions)].sum())
        return [] if float(scores[positions].sum()) >= best - tiny else ["other words have a larger sum"]
    above = bool(scores[positions].mean() > np.nanmean(scores))
    if says == "important":
        return [] if above else ["not above the mean"]
    return ["above the mean"] if above else []


def places(words: Sequence[str], attribution: Attribution) -> list[tuple[int, ...]]:
    """Positions of each quoted word or run, the best-scored ones still free; empty where it is not in the text."""
    tokens = [token.lower() for token in attribution.tokens]
    taken: set[int] = set()
    found = []
    for word in words:
        pieces = word.lower().split()
        spots = [
            tuple(range(i, i + len(pieces)))
            for i in range(len(tokens) - len(pieces) + 1)
            if tokens[i : i + len(pieces)] == pieces and attribution.judged[i : i + len(pieces)].all()
        ]
        free = [spot for spot in spots if not taken & set(spot)] or spots
        best = max(free, key=lambda spot: float(attribution.scores[list(spot)].sum()), default=())
        taken |= set(best)
        found.append(best)
    return found
