"""The search page: ask, and see which document answers which part of the question, and why."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from polyhead.errors import InputError
from polyhead.search.strategies import STRATEGIES
from polyhead.search.update import POSTED
from polyhead.serve.pages.asking import MOST_HITS, Ask, Choices, choices_of
from polyhead.serve.pages.marking import excerpt, marked, words_of

if TYPE_CHECKING:
    from polyhead.search.engine import Hit, SearchResult
    from polyhead.search.strategies import HeadShare
    from polyhead.serve.pages.site import Site
    from polyhead.serve.service import Service

__all__ = ["add_search"]


def add_search(app: FastAPI, site: Site) -> None:
    """Add the page ``/`` and the part of it that htmx asks for, ``/app/results``."""
    service = site.service
    shelf = _Shelf(service)

    @app.get("/", include_in_schema=False)
    async def search_page(request: Request) -> HTMLResponse:
        """The form, and the results of what the address asks."""
        ask = Ask.read(request.query_params)
        values: dict[str, Any] = {"columns": [], "trouble": None}
        state, choices = await site.run(shelf.look)
        if state == "there" and ask.q:
            try:
                values["columns"] = await _answer(site, ask)
            except InputError as error:  # the form stays, so that what was typed can be mended
                values["trouble"] = str(error)
        status = 422 if values["trouble"] else 200
        return site.page(
            "search.html",
            status=status,
            here="Search",
            ask=ask,
            state=state,
            choices=choices,
            strategies=STRATEGIES,
            most=min(service.limits.hits, MOST_HITS),
            **values,
        )

    @app.get("/app/results", include_in_schema=False)
    async def results(request: Request) -> HTMLResponse:
        """The results alone; the browser's address becomes the one of the page that shows them."""
        ask = Ask.read(request.query_params)
        columns = await _answer(site, ask) if ask.q else []
        page = site.page("_results.html", ask=ask, columns=columns, trouble=None, part=True)
        page.headers["HX-Replace-Url"] = ask.address
        return page


class _Shelf:
    """Whether there is something to search, and what to filter it by."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._known: Choices | None = None

    def look(self) -> tuple[str, Choices]:
        """ "there", "empty" or "none", and the choices of the form."""
        index = self._service.index
        if index is None or not index.exists():
            return ("none" if index is None else "empty"), Choices(0, [], [])
        self._known = choices_of(index, self._known)
        return ("there" if self._known.kinds else "empty"), self._known


@dataclass(frozen=True)
class _Shown:
    """A hit as the page shows it.

    Attributes:
        excerpt, whole: of its text, marked; ``whole`` is None where the excerpt is all of it.
        heads: rows and columns of the picture's cells, each with its opacity and its words.
        heads_said: the picture in words.
    """

    hit: Hit
    name: str
    title: str
    excerpt: Markup
    whole: Markup | None
    heads: list[tuple[int, int, float, str]]
    heads_said: str


@dataclass(frozen=True)
class _Column:
    """What one strategy found."""

    strategy: str
    result: SearchResult
    summary: str
    hits: list[_Shown]
    grid: tuple[int, int]
    lines: str
    json: str
    python: str
    trouble: None = None


@dataclass(frozen=True)
class _Refused:
    """A strategy that cannot answer this, beside one that may."""

    strategy: str
    trouble: str
    hits: tuple[()] = ()


async def _answer(site: Site, ask: Ask) -> list[_Column | _Refused]:
    """One column for each strategy asked for; they are worked out at the same time."""
    for name in ask.strategies:
        if name not in STRATEGIES:
            raise InputError(f"There is no strategy {name!r}; choose one of {', '.join(STRATEGIES)}.")
    k, where = ask.count(site.service.limits.hits), ask.where()
    work = [site.run(_column, site.service, ask, name, k, where) for name in ask.strategies]
    found = await asyncio.gather(*work, return_exceptions=True)
    columns: list[_Column | _Refused] = []
    for name, one in zip(ask.strategies, found, strict=True):
        if isinstance(one, InputError) and len(found) > 1:  # the strategy beside it may have an answer
            columns.append(_Refused(name, str(one)))
        elif isinstance(one, BaseException):
            raise one
        else:
            columns.append(one)
    return columns


def _column(service: Service, ask: Ask, strategy: str, k: int, where: str | None) -> _Column:
    result = service.search(ask.q, k=k, strategy=strategy, where=where, language="en")
    words = words_of(ask.q)
    layers, (_, heads, _) = list(service.encoder.head_layers), service.encoder.head_shape
    found = result.to_json()
    for hit in found["hits"]:
        hit["document"], hit["path"] = _plain(hit["document"]), _plain(hit["path"])
    return _Column(
        strategy,
        result,
        STRATEGIES[strategy].summary,
        [_shown(hit, words, layers) for hit in result.hits],
        (len(layers), heads),
        _grid_lines(len(layers), heads),
        json.dumps(found, indent=2, ensure_ascii=False),
        _python(service, ask.q, strategy, k, where),
    )


def _shown(hit: Hit, words: frozenset[str], layers: list[int]) -> _Shown:
    name = _plain(hit.path)
    short, cut = excerpt(hit.text, words)
    said = [f"layer {one.layer}, head {one.head}: {one.share:.1%} of the agreement" for one in hit.heads]
    strongest = max((one.share for one in hit.heads), default=0.0) or 1.0
    cells = [
        (layers.index(one.layer), one.head, _opacity(one, strongest), text)
        for one, text in zip(hit.heads, said, strict=True)
    ]
    whole = marked(hit.text, words) if cut else None
    return _Shown(hit, name, hit.title or hit.heading or name, short, whole, cells, "; ".join(said))


def _opacity(head: HeadShare, strongest: float) -> float:
    """The head's share beside the strongest one's, never so faint that it cannot be seen."""
    return round(max(0.25, head.share / strongest), 2)


def _grid_lines(layers: int, heads: int) -> str:
    """An SVG path of the lines between cells of 10 by 10."""
    across = [f"M0 {10 * row}H{10 * heads}" for row in range(layers + 1)]
    return "".join(across + [f"M{10 * column} 0V{10 * layers}" for column in range(heads + 1)])


def _plain(path: str) -> str:
    return str(path).removeprefix(POSTED)


def _python(service: Service, query: str, strategy: str, k: int, where: str | None) -> str:
    """The same search in Python."""
    uri = service.index.uri if service.index is not None else ""
    options: Sequence[str] = [f"k={k}", f"by={strategy!r}", *([f"where={where!r}"] if where else [])]
    return (
        "from polyhead.embed import Encoder\n"
        "from polyhead.search.engine import search_index\n"
        "from polyhead.search.index import Index\n\n"
        "found = search_index(\n"
        f"    Index.open({uri!r}),\n"
        f"    {query!r},\n"
        f"    Encoder({service.model!r}),\n"
        f"    {', '.join(options)},\n"
        ")\n"
        "for hit in found.hits:\n"
        "    print(hit.rank, hit.path, hit.title, hit.answers)\n"
    )
