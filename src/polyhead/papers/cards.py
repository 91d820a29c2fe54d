"""The cards: reading ``catalogue.yaml``, looking a paper up, filtering, and its latest evidence."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from polyhead.errors import InputError

__all__ = ["EVIDENCE", "STATES", "Paper", "catalogue", "evidence", "find", "search_papers"]

STATES = ("planned", "partial", "works")
"""planned: nothing yet; partial: some of it is usable; works: code, tests, documentation and a claim that has run."""

EVIDENCE = Path(__file__).parent / "evidence"
"""Folder of the latest result of each claim that has run, ``<id>.json``; absent until the first one has."""


@dataclass(frozen=True)
class Paper:
    """One card of the catalogue.

    Attributes:
        id: the name used in code, claims and evidence.
        title: the paper's title.
        arxiv: arXiv id, or ``None``.
        arxiv_checked: whether somebody has compared the arXiv id with the paper; else it is from memory.
        family: the part of the field, for example ``"attention"``.
        kind: ``mechanism``, ``system``, ``study``, ``benchmark`` or ``survey``.
        summary: what the method is.
        claim: what the paper reports; the paper's word, not a result of ours.
        code: public dotted names that implement it.
        claim_file: the experiment that tests the claim, as a path below ``polyhead/``, or ``None``.
        docs: its page in the documentation, as a path below ``docs/``, or ``None``.
        state: one of :data:`STATES`.
        seeds: the source lists that name the paper.
    """

    id: str
    title: str
    arxiv: str | None
    arxiv_checked: bool
    family: str
    kind: str
    summary: str
    claim: str
    code: tuple[str, ...] = ()
    claim_file: str | None = None
    docs: str | None = None
    state: str = "planned"
    seeds: tuple[str, ...] = ()


def read_cards(text: str) -> list[Paper]:
    """The cards of a catalogue in YAML, in its order.

    Raises:
        InputError: a key no card has, a missing one, an unknown state or an id used twice.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    cards: dict[str, Paper] = {}
    for row in yaml.load(text, Loader=loader):
        name = row.get("id", "without id")
        fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        try:
            card = Paper(**fields)
        except TypeError as error:
            raise InputError(
                f"The card {name!r} has the wrong keys: {error}. The keys are the fields of Paper."
            ) from None
        if card.state not in STATES:
            raise InputError(f"The card {name!r} has state {card.state!r}, expected one of {', '.join(STATES)}.")
        if name in cards:
            raise InputError(f"The id {name!r} stands on two cards of the catalogue; ids are unique.")
        cards[name] = card
    return list(cards.values())


@lru_cache(maxsize=1)
def _cards() -> Mapping[str, Paper]:
    text = (Path(__file__).parent / "catalogue.yaml").read_text(encoding="utf-8")
    return {card.id: card for card in read_cards(text)}


def catalogue() -> dict[str, Paper]:
    """All cards by id, in the order of the catalogue: by family, each in the order of its list.

    The file is read once a process (about 50 ms); the dictionary returned is the caller's own.

    Example:
        >>> len(catalogue())
        349
    """
    return dict(_cards())


def find(id: str) -> Paper:
    """The card of one paper. Capitals, spaces and underscores in ``id`` are forgiven.

    Raises:
        InputError: no such paper; the message names those that come near, by id or by title.

    Example:
        >>> find("Longheads").family
        'attention'
    """
    cards = _cards()
    name = "-".join(id.lower().replace("_", " ").split())
    if name in cards:
        return cards[name]
    near = _near(name, cards.values())
    hint = f"Did you mean {', '.join(near)}?" if near else "No id or title comes near."
    raise InputError(
        f"No paper {id!r} among the {len(cards)} of the catalogue. {hint} `polyhead papers` lists them all."
    )


def _near(name: str, cards: Iterable[Paper], most: int = 5) -> list[str]:
    """Ids that look like ``name``, then those that hold it or whose titles hold all its words."""
    cards = list(cards)
    near = get_close_matches(name, [card.id for card in cards], n=most, cutoff=0.6)
    words = name.split("-")
    holding = [
        card.id for card in cards if name and (name in card.id or all(word in card.title.lower() for word in words))
    ]
    return list(dict.fromkeys(near + holding))[:most]


def search_papers(
    words: str = "", *, family: str | None = None, state: str | None = None, kind: str | None = None
) -> list[Paper]:
    """The cards that match, in the order of the catalogue.

    Args:
        words: every word must occur in the id, title, summary or claim; capitals do not matter. Empty matches all.
        family: only this family, for example ``"heads"``.
        state: only this state, one of :data:`STATES`.
        kind: only this kind, for example ``"benchmark"``.

    Raises:
        InputError: a family, state or kind that no card could have; the message lists those there are.

    Example:
        >>> [card.id for card in search_papers("multi-aspect rag")]
        ['mrag']
    """
    cards = list(_cards().values())
    _expect("family", family, sorted({card.family for card in cards}))
    _expect("state", state, STATES)
    _expect("kind", kind, sorted({card.kind for card in cards}))
    wanted = words.lower().split()

    def matches(card: Paper) -> bool:
        text = f"{card.id} {card.title} {card.summary} {card.claim}".lower()
        return (
            family in (None, card.family)
            and state in (None, card.state)
            and kind in (None, card.kind)
            and all(word in text for word in wanted)
        )

    return [card for card in cards if matches(card)]


def _expect(what: str, given: str | None, allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    if given is not None and given not in allowed:
        raise InputError(f"The {what} {given!r} is not in the catalogue, expected one of {', '.join(allowed)}.")


def evidence(id: str) -> dict[str, Any] | None:
    """The latest result of the paper's claim as shipped with the package, or ``None`` where it has not run.

    The file ``papers/evidence/<id>.json`` holds what a claim measured: ``verdict`` (supported, refuted,
    inconclusive, untestable here), ``measured``, ``baseline``, ``expected``, ``interval`` and how it was run.

    Raises:
        InputError: no such paper, as in :func:`find`.

    Example:
        >>> found = evidence("mrag")
        >>> found is None or "verdict" in found
        True
    """
    file = EVIDENCE / f"{find(id).id}.json"
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
