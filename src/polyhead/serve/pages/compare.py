"""The page of comparisons: two strategies on questions typed or on labelled ones, and the documents in a plane."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from polyhead.errors import InputError
from polyhead.search.strategies import DEFAULT_STRATEGY, STRATEGIES
from polyhead.search.update import POSTED
from polyhead.serve.pages.labelled import LABELLED, Labelled, Trial
from polyhead.serve.pages.plane import COLOURS, Plane, figure_of, plane_of

if TYPE_CHECKING:
    from polyhead.search.engine import Hit
    from polyhead.serve.pages.site import Site
    from polyhead.serve.service import Service

__all__ = ["Versus", "add_compare"]

MOST_QUESTIONS = 20
MOST_DOCUMENTS = 50


@dataclass(frozen=True)
class Versus:
    """What is compared, as it was typed; each field is a parameter of the address.

    Attributes:
        first, second: strategies.
        questions: one a line.
        k: documents of a list.
    """

    first: str = DEFAULT_STRATEGY
    second: str = "dense"
    questions: str = ""
    k: str = "10"

    @classmethod
    def read(cls, given: Mapping[str, str]) -> Versus:
        """From the parameters of a request; what is blank has its default."""
        known = {field.name: given.get(field.name, "").strip() for field in fields(cls)}
        return cls(**{name: value for name, value in known.items() if value})

    def lines(self) -> list[str]:
        """The questions.

        Raises:
            InputError: more than are asked at once.
        """
        found = [line.strip() for line in self.questions.splitlines() if line.strip()]
        if len(found) > MOST_QUESTIONS:
            raise InputError(f"{len(found)} questions were typed; at most {MOST_QUESTIONS} are asked at once.")
        return found

    def count(self, most: int) -> int:
        """``k`` as a number.

        Raises:
            InputError: it is none, or not from 1 to ``most``.
        """
        if not self.k.isascii() or not self.k.isdigit() or not 1 <= int(self.k[:9]) <= most:
            raise InputError(f"The length of the lists is {self.k!r}; give a whole number from 1 to {most}.")
        return int(self.k)

    def strategies(self) -> tuple[str, str]:
        """The two, checked.

        Raises:
            InputError: there is no such strategy.
        """
        for name in (self.first, self.second):
            if name not in STRATEGIES:
                raise InputError(f"There is no strategy {name!r}; choose one of {', '.join(STRATEGIES)}.")
        return self.first, self.second


@dataclass(frozen=True)
class _Answers:
    """Two lists for one question: rank, title, path, and whether the other list has the document too."""

    question: str
    lists: tuple[list[tuple[int, str, str, bool]], list[tuple[int, str, str, bool]]]
    shared: int
    overlap: float


def add_compare(app: FastAPI, site: Site) -> None:
    """Add the page ``/app/compare`` and the parts of it that htmx asks for."""
    service = site.service
    shelf = _Planes(service)
    _add_parts(app, site, shelf)

    @app.get("/app/compare", include_in_schema=False)
    async def compare_page(request: Request) -> HTMLResponse:
        """The forms, and the answers to the questions in the address."""
        versus, trouble, answers = Versus.read(request.query_params), "", []
        state = await site.run(_state, service)
        try:
            if state == "there":
                answers = await site.run(_answers, service, versus)
        except InputError as error:
            trouble = str(error)
        return site.page(
            "compare.html",
            status=422 if trouble else 200,
            here="Compare",
            versus=versus,
            state=state,
            strategies=STRATEGIES,
            answers=answers,
            trouble=trouble,
            most=min(service.limits.hits, MOST_DOCUMENTS),
            questions_most=MOST_QUESTIONS,
            sets=LABELLED,
            colours=await site.run(shelf.colours) if state == "there" else (),
        )


def _add_parts(app: FastAPI, site: Site, shelf: _Planes) -> None:
    service, labelled = site.service, Labelled(site.service)

    @app.get("/app/compare/lists", include_in_schema=False)
    async def lists(request: Request) -> HTMLResponse:
        """The answers alone."""
        versus = Versus.read(request.query_params)
        answers = await site.run(_answers, service, versus)
        return site.page("_answers.html", versus=versus, answers=answers, trouble="")

    @app.get("/app/compare/labelled", include_in_schema=False)
    async def on_labels(request: Request) -> HTMLResponse:
        """How far a trial on labelled data is, or what it found; it begins with the first request."""
        given = request.query_params
        first, second = Versus.read(given).strategies()
        if first == second:
            raise InputError(f"Both strategies are {first!r}; choose two different ones to compare.")
        trial = Trial(given.get("data", ""), first, second, given.get("size", "200").strip())
        return site.page("_labelled.html", trial=trial, run=labelled.of(trial))

    @app.get("/app/compare/plane", include_in_schema=False)
    async def plane(request: Request) -> HTMLResponse:
        """The documents as points."""
        colour = request.query_params.get("colour", "") or COLOURS[0]
        found = await site.run(shelf.plane)
        figure, rows = figure_of(found, colour)
        return site.page("_plane.html", plane=found, colour=colour, figure=json.dumps(figure), rows=rows)


def _state(service: Service) -> str:
    """ "there", "empty" or "none": what the index is."""
    if service.index is None:
        return "none"
    return "there" if service.chunks() else "empty"


def _answers(service: Service, versus: Versus) -> list[_Answers]:
    """Both lists for every question."""
    names, questions = versus.strategies(), versus.lines()
    k = versus.count(min(service.limits.hits, MOST_DOCUMENTS))
    return [_answer(service, question, names, k) for question in questions]


def _answer(service: Service, question: str, names: tuple[str, str], k: int) -> _Answers:
    first, second = (service.search(question, k=k, strategy=name, where=None, language="en").hits for name in names)
    shared = {hit.document for hit in first} & {hit.document for hit in second}
    longest = max(len(first), len(second))
    return _Answers(
        question,
        (_listed(first, shared), _listed(second, shared)),
        len(shared),
        len(shared) / longest if longest else 0.0,
    )


def _listed(hits: list[Hit], shared: set[str]) -> list[tuple[int, str, str, bool]]:
    found = []
    for hit in hits:
        path = str(hit.path).removeprefix(POSTED)
        found.append((hit.rank, hit.title or hit.heading or path, path, hit.document in shared))
    return found


class _Planes:
    """The plane of the index's documents, made once for each of its versions."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._known: tuple[int, Plane] | None = None

    def plane(self) -> Plane:
        """See :func:`polyhead.serve.pages.plane.plane_of`.

        Raises:
            InputError: no index, or an empty one.
        """
        index = self._service.index
        if index is None or not index.exists():
            raise InputError("There are no documents to draw: this service has no index, or an empty one.")
        version = index.store.version
        if self._known is None or self._known[0] != version:
            self._known = (version, plane_of(index.view()))
        return self._known[1]

    def colours(self) -> tuple[str, ...]:
        """What points can be coloured by."""
        return (*COLOURS, *self.plane().attributes)
