"""What all pages share: templates, files, headers and the page that tells of an error."""

from __future__ import annotations

import asyncio
import importlib.metadata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool

from polyhead import __version__
from polyhead.errors import MissingExtraError
from polyhead.serve.pages.compare import add_compare
from polyhead.serve.pages.heads import add_heads
from polyhead.serve.pages.papers import add_papers
from polyhead.serve.pages.search import add_search

if TYPE_CHECKING:
    from polyhead.serve.service import Service

__all__ = ["Site", "add_pages", "wants_page"]

_T = TypeVar("_T")
HERE = Path(__file__).parent
LIBRARIES = {
    "htmx.js": ("django-htmx", "django_htmx/static/django_htmx/htmx-2.min.js"),
    "plotly.js": ("plotly", "plotly/package_data/plotly.min.js"),
}
# Plotly writes style attributes; scripts come from files of this service alone.
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'"
HEADERS = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Site:
    """Renders templates for one service.

    Args:
        service: what the pages show.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        loader = PackageLoader("polyhead.serve.pages", "templates")
        self._templates = Environment(
            loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        self._templates.globals.update(version=__version__, model=service.model)

    def page(self, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
        """A template with its values, as a response that browsers treat with care."""
        return HTMLResponse(self._templates.get_template(template).render(**values), status, HEADERS)

    def trouble(self, status: int, title: str, message: str, *, part: bool = False) -> HTMLResponse:
        """An error told kindly: a whole page, or a part of one where htmx asked."""
        template = "_trouble.html" if part else "trouble.html"
        return self.page(template, status=status, title=title, message=message, here="")

    async def run(self, work: Callable[..., _T], *given: Any) -> _T:
        """What ``work`` returns, run in a thread; within the time that the service allows."""
        return await asyncio.wait_for(run_in_threadpool(work, *given), self.service.limits.seconds)


def add_pages(app: FastAPI, service: Service) -> Site:
    """Add all pages and their files to the application."""
    site = Site(service)
    add_search(app, site)
    add_heads(app, site)
    add_compare(app, site)
    add_papers(app, site)

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        path = _file(name)
        if path is None:
            return site.trouble(404, "There is no such file", f"/static/{name} is none of this service's files.")
        return FileResponse(path, headers={"Cache-Control": "max-age=3600", "X-Content-Type-Options": "nosniff"})

    return site


def wants_page(request: Request) -> bool:
    """Whether a person's browser asks (for a page, or through htmx for a part of one), and no program."""
    return "hx-request" in request.headers or "text/html" in request.headers.get("accept", "")


@lru_cache
def _file(name: str) -> Path | None:
    """A file of the pages by its bare name; None where there is none."""
    if name in LIBRARIES:
        package, inside = LIBRARIES[name]
        try:
            found = Path(str(importlib.metadata.distribution(package).locate_file(inside)))
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingExtraError(f"The pages need {package}: pip install 'polyhead[serve]'") from error
        if not found.is_file():
            raise MissingExtraError(f"The installed {package} has no {inside}; install the version of polyhead[serve].")
        return found
    known = {path.name: path for path in (HERE / "static").iterdir()}
    return known.get(name)
