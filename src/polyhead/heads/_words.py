"""Word lists for scores that ask what a head does to a word: relations of pairs, and classes in an order."""

from __future__ import annotations

from itertools import pairwise

__all__ = ["ORDINALS", "PROMPTS", "RELATIONS"]

_NUMBERS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
_MONTHS = "January February March April May June July August September October November December"
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_PLACES = "first second third fourth fifth sixth seventh eighth ninth tenth"

ORDINALS: dict[str, tuple[str, ...]] = {
    "days": tuple(_DAYS.split()),
    "months": tuple(_MONTHS.split()),
    "numbers": tuple(_NUMBERS.split()),
    "places": tuple(_PLACES.split()),
    "letters": tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
}
"""Classes of words in an order; days and months go round."""

_NOUNS = (
    "cat dog house car book tree hand eye river road bird king ship wall door game song horse farm town word name "
    "year day night girl boy friend school table window garden letter number school bridge island mountain planet "
    "engine"
)
_CAPITALS = (
    "France Paris Germany Berlin Italy Rome Spain Madrid England London Japan Tokyo China Beijing Russia Moscow "
    "Egypt Cairo Greece Athens Austria Vienna Poland Warsaw Ireland Dublin Norway Oslo Sweden Stockholm Portugal "
    "Lisbon Turkey Ankara Cuba Havana Kenya Nairobi Thailand Bangkok Hungary Budapest Peru Lima Iran Tehran Iraq "
    "Baghdad Canada Ottawa Finland Helsinki Denmark Copenhagen Syria Damascus Lebanon Beirut Afghanistan Kabul"
)
_ANTONYMS = (
    "hot cold big small good bad high low old new fast slow hard soft light dark rich poor strong weak open "
    "closed happy sad early late full empty long short near far right wrong up down left right in out young old "
    "true false love hate war peace day night black white male female win lose buy sell push pull first last wet "
    "dry alive dead"
)


def _couples(text: str) -> tuple[tuple[str, str], ...]:
    words = text.split()
    return tuple(zip(words[::2], words[1::2], strict=True))


RELATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "copy": tuple((word, word) for word in _NOUNS.split()),
    "plural": tuple((word, word + "s") for word in _NOUNS.split() if word != "day"),
    "capital": _couples(_CAPITALS),
    "antonym": _couples(_ANTONYMS),
    "first-letter": tuple((word, word[0].upper()) for word in _NOUNS.split()),
    "following": tuple(pair for words in ORDINALS.values() for pair in pairwise(words)),
}
"""Pairs (source, target): what a head with that function turns the source into."""

PROMPTS: dict[str, str] = {
    "copy": "{s}, {s}, {s},",
    "plural": "One {s}, two",
    "capital": "The capital of {s} is",
    "antonym": "The opposite of {s} is",
    "first-letter": "The word {s} begins with the letter",
    "following": "After {s} comes",
}
"""A prompt for each relation, to be followed by the target."""
