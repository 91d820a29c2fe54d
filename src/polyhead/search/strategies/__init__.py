"""Search strategies: each turns a question into ranked rows with reasons. One file each."""

from __future__ import annotations

from polyhead.errors import InputError
from polyhead.search.strategies.aspects import Aspects
from polyhead.search.strategies.base import HeadShare, Ranking, Reason, Strategy, TokenMatch
from polyhead.search.strategies.dense import Dense
from polyhead.search.strategies.heads import Heads
from polyhead.search.strategies.late import Late
from polyhead.search.strategies.parts import Parts
from polyhead.search.strategies.vote import Vote

__all__ = [
    "DEFAULT_STRATEGY",
    "STRATEGIES",
    "Aspects",
    "Dense",
    "HeadShare",
    "Heads",
    "Late",
    "Parts",
    "Ranking",
    "Reason",
    "Strategy",
    "TokenMatch",
    "Vote",
    "strategy",
]

STRATEGIES: dict[str, type[Strategy]] = {cls.name: cls for cls in (Aspects, Dense, Heads, Vote, Parts, Late)}
DEFAULT_STRATEGY = Aspects.name


def strategy(name_or_strategy: str | Strategy) -> Strategy:
    """A strategy by name with its default knobs, or the given one as it is."""
    if isinstance(name_or_strategy, Strategy):
        return name_or_strategy
    try:
        return STRATEGIES[name_or_strategy]()
    except KeyError:
        raise InputError(f"Unknown strategy '{name_or_strategy}'. Expected one of: {', '.join(STRATEGIES)}.") from None
