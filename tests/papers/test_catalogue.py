"""The catalogue itself: complete, valid, in our own words, quick to read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from polyhead.errors import InputError
from polyhead.papers import Paper, catalogue
from polyhead.papers.cards import STATES, read_cards

PAPERS = 349
FAMILIES = {
    "attention": 51, "audio": 2, "brain": 3, "cache": 4, "compress": 13, "encoder": 16, "evaluate": 31, "face": 15,
    "generation": 11, "graph": 6, "heads": 30, "index": 4, "intervene": 9, "multimodal": 18, "objective": 26,
    "pooling": 8, "position": 4, "select": 11, "survey": 4, "tabular": 7, "theory": 19, "training": 30, "vision": 27,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus() -> dict[str, dict[str, Any]]:
    """The corpus the catalogue was made from, where it is at hand: ``catalogue/`` beside the real data."""
    data = os.environ.get("POLYHEAD_DATA")
    shared = Path(data).parent if data else Path(__file__).parents[3] / "shared"
    files = sorted((shared / "catalogue").glob("*.yaml"))
    if not files:
        pytest.skip("the shared corpus is not on this machine")
    rows = [row for file in files for row in yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)]
    return {row["id"]: row for row in rows}


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + length]) for start in range(len(found) - length + 1)}


def test_every_paper_of_the_corpus_has_a_card() -> None:
    cards = catalogue()
    assert len(cards) == PAPERS
    counted: dict[str, int] = {}
    for name, card in cards.items():
        assert card.id == name
        counted[card.family] = counted.get(card.family, 0) + 1
    assert counted == FAMILIES


def test_ids_titles_and_families_are_those_of_the_corpus(corpus: dict[str, dict[str, Any]]) -> None:
    cards = catalogue()
    assert set(cards) == set(corpus)
    for name, card in cards.items():
        assert card.family == corpus[name]["family"]
        assert words(card.title) == words(corpus[name]["title"])


@pytest.mark.parametrize("field", ["summary", "claim"])
def test_texts_are_our_own_words(field: str, corpus: dict[str, dict[str, Any]]) -> None:
    copied = {}
    for name, card in catalogue().items():
        row = corpus[name]
        theirs = " ".join(str(row[key]) for key in ("title", "what", "build", "claim", "check"))
        shared = runs(getattr(card, field), 8) & runs(theirs, 8)
        if shared:
            copied[name] = " / ".join(" ".join(run) for run in shared)
    assert copied == {}


def test_every_card_says_something_of_a_readable_length() -> None:
    wrong = {name: card.summary for name, card in catalogue().items() if not 12 <= len(card.summary.split()) <= 60}
    assert wrong == {}
    wrong = {name: card.claim for name, card in catalogue().items() if not 6 <= len(card.claim.split()) <= 45}
    assert wrong == {}
    summaries = [card.summary for card in catalogue().values()]
    assert len(set(summaries)) == len(summaries)


def test_fields_are_well_formed() -> None:
    for card in catalogue().values():
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", card.id), card.id
        assert card.state in STATES
        assert card.kind in {"mechanism", "system", "study", "benchmark", "survey"}
        assert card.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7}", card.arxiv), card.id
        assert isinstance(card.arxiv_checked, bool)
        for text in (card.title, card.summary, card.claim):
            assert text == text.strip()
            assert "\n" not in text
        assert card.summary.endswith(".")
        assert card.claim.endswith(".")


def card_yaml(**changes: object) -> str:
    card = {
        "id": "one", "title": "T", "arxiv": None, "arxiv_checked": False, "family": "heads", "kind": "study",
        "summary": "S.", "claim": "C.", "code": [], "claim_file": None, "docs": None, "state": "planned", "seeds": [],
    }  # fmt: skip
    return yaml.safe_dump([{key: value for key, value in {**card, **changes}.items() if value != "absent"}])


def test_cards_are_read_as_written() -> None:
    assert read_cards(card_yaml(code=["a.b", "c.d"], state="works")) == [
        Paper("one", "T", None, False, "heads", "study", "S.", "C.", code=("a.b", "c.d"), state="works")
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (card_yaml(state="done"), "'done', expected one of planned, partial, works"),
        (card_yaml(colour="red"), "colour"),
        (card_yaml(claim="absent"), "claim"),
        (card_yaml() + card_yaml(), "'one' stands on two cards"),
    ],
)
def test_a_wrong_card_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read_cards(text)


def test_the_catalogue_given_out_is_the_callers_own() -> None:
    catalogue().clear()
    assert len(catalogue()) == PAPERS
