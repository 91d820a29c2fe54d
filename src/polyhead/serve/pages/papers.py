"""The pages of the papers: the catalogue, one page a paper, and the feed of what became true last."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from polyhead.errors import InputError
from polyhead.papers import Paper, catalogue, evidence, find, search_papers
from polyhead.papers.cards import STATES
from polyhead.serve.pages.asking import from_address
from polyhead.serve.pages.cardsearch import LIKENESS, CardSearch
from polyhead.serve.pages.evidenceview import found_on, plot_of
from polyhead.serve.pages.feed import atom
from polyhead.serve.pages.marking import excerpt, marked, words_of
from polyhead.serve.pages.samples import sample_of

if TYPE_CHECKING:
    from polyhead.serve.pages.site import Site

__all__ = ["add_papers"]

WAYS = {"aspects": "by meaning, in parts", "dense": "by meaning, as a whole", "words": "every word occurs"}
VERDICTS = ("supported", "refuted", "inconclusive", "untestable here", "none yet")
MOST_FOUND = 30
MOST_SIMILAR = 8


@dataclass(frozen=True)
class PaperAsk:
    """What is asked of the catalogue; each field is a parameter of the address, "" for no restriction."""

    q: str = ""
    by: str = "aspects"
    family: str = ""
    state: str = ""
    verdict: str = ""

    @classmethod
    def read(cls, given: Mapping[str, str]) -> PaperAsk:
        """From the parameters of a request; what is blank has its default."""
        return from_address(cls, given)

    @property
    def address(self) -> str:
        """Of the page that shows this; defaults are left out."""
        plain = asdict(PaperAsk())
        given = {name: value for name, value in asdict(self).items() if value != plain[name]}
        return "/app/papers?" + urlencode(given) if given else "/app/papers"


@dataclass(frozen=True)
class _Row:
    """A paper of the list."""

    card: Paper
    verdict: str
    title: str
    summary: str
    answers: str | None


def add_papers(app: FastAPI, site: Site) -> None:
    """Add ``/app/papers``, its part ``/app/papers-found``, a page each, what is similar, and the feed."""
    search = CardSearch(site.service)

    @app.get("/app/papers", include_in_schema=False)
    async def papers_page(request: Request) -> HTMLResponse:
        """The catalogue, or what of it was asked for."""
        ask = PaperAsk.read(request.query_params)
        rows: list[_Row] = []
        trouble = None
        try:
            rows = await site.run(_rows, search, ask)
        except InputError as error:
            trouble = str(error)
        families = sorted({card.family for card in catalogue().values()})
        values = {"ask": ask, "rows": rows, "counts": _counts(rows), "trouble": trouble, "families": families}
        choices = {"ways": WAYS, "states": STATES, "verdicts": VERDICTS}
        return site.page("papers.html", status=422 if trouble else 200, here="Papers", **values, **choices)

    @app.get("/app/papers-found", include_in_schema=False)
    async def papers_found(request: Request) -> HTMLResponse:
        """The list alone; the browser's address becomes the one of the page that shows it."""
        ask = PaperAsk.read(request.query_params)
        rows = await site.run(_rows, search, ask)
        page = site.page("_papers.html", ask=ask, rows=rows, counts=_counts(rows), trouble=None, part=True)
        page.headers["HX-Replace-Url"] = ask.address
        return page

    @app.get("/app/papers.atom", include_in_schema=False)
    def feed(request: Request) -> Response:
        """What became true last."""
        return Response(atom(str(request.base_url).rstrip("/")), media_type="application/atom+xml")

    @app.get("/app/papers/{id}", include_in_schema=False)
    async def paper_page(id: str, similar: str = "") -> HTMLResponse:
        """One paper: what it is, its code, our evidence, and its neighbours where the address asks for them."""
        try:
            card = find(id)
        except InputError as error:
            return site.trouble(404, "There is no such paper", str(error))
        by = similar if similar in LIKENESS else ""
        found = await site.run(search.similar, card, by, MOST_SIMILAR) if by else []
        values = await site.run(_page_values, card)
        return site.page("paper.html", here="Papers", by=by, similar=found, likeness=LIKENESS, **values)

    @app.get("/app/papers/{id}/similar", include_in_schema=False)
    async def similar_part(id: str, by: str = "method") -> HTMLResponse:
        """The papers nearest to one."""
        card = find(id)
        if by not in LIKENESS:
            raise InputError(f"Papers are not similar by {by!r}; choose one of {', '.join(LIKENESS)}.")
        found = await site.run(search.similar, card, by, MOST_SIMILAR)
        return site.page("_similar.html", card=card, by=by, similar=found, likeness=LIKENESS)


def _rows(search: CardSearch, ask: PaperAsk) -> list[_Row]:
    """What was asked for: the catalogue's order without a question, else best first."""
    if ask.by not in WAYS:
        raise InputError(f"Papers are not searched {ask.by!r}; choose one of {', '.join(WAYS)}.")
    if ask.verdict and ask.verdict not in VERDICTS:
        raise InputError(f"There is no verdict {ask.verdict!r}; choose one of {', '.join(VERDICTS)}.")
    words = ask.q if ask.by == "words" else ""
    cards = search_papers(words, family=ask.family or None, state=ask.state or None)
    verdicts = {card.id: _verdict(card) for card in cards}
    cards = [card for card in cards if ask.verdict in ("", verdicts[card.id])]
    answers: dict[str, str | None] = {}
    if ask.q and ask.by != "words":
        found = search.ask(ask.q, cards, ask.by, MOST_FOUND)
        answers = {one.card.id: one.answers for one in found}
        cards = [one.card for one in found]
    asked = words_of(ask.q)
    return [
        _Row(
            card,
            verdicts[card.id],
            marked(card.title, asked),
            excerpt(card.summary, asked, 240)[0] if ask.q else "",
            answers.get(card.id),
        )
        for card in cards
    ]


def _verdict(card: Paper) -> str:
    found = evidence(card.id)
    return "none yet" if found is None else str(found.get("verdict", "none yet"))


def _counts(rows: list[_Row]) -> str:
    """How many there are, by state."""
    states = Counter(row.card.state for row in rows)
    told = ", ".join(f"{states[state]} {state}" for state in reversed(STATES) if states[state])
    return f"{len(rows)} {'paper' if len(rows) == 1 else 'papers'}" + (f": {told}" if told else "")


def _page_values(card: Paper) -> dict[str, Any]:
    found = evidence(card.id)
    values: dict[str, Any] = {"card": card, "evidence": found, "samples": [sample_of(name) for name in card.code]}
    if found is None:
        return {**values, "plot": None, "when": None, "details": ""}
    when, says = found_on(card.id, found)
    details = json.dumps(found["details"], indent=1, ensure_ascii=False) if found.get("details") else ""
    return {**values, "plot": plot_of(found), "when": when.date().isoformat() if says else None, "details": details}
