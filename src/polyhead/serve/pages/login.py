"""Signing in: a browser cannot send a key as a header, so it keeps it in a cookie that scripts cannot read."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from fastapi.responses import RedirectResponse, Response

if TYPE_CHECKING:
    from polyhead.serve.keys import KeyRing
    from polyhead.serve.pages.site import Site

__all__ = ["COOKIE", "add_login"]

COOKIE = "polyhead_key"


def add_login(app: FastAPI, site: Site, keys: KeyRing) -> None:
    """Add the page that asks for a key. The cookie goes with requests from this service's own pages alone."""

    @app.get("/login", include_in_schema=False)
    async def ask(next: str = "/") -> Response:
        return site.page("login.html", here="", next=_inside(next), refused=False)

    @app.post("/login", include_in_schema=False)
    async def check(request: Request) -> Response:
        given = {
            name: values[0] for name, values in parse_qs((await request.body()).decode("utf-8", "replace")).items()
        }
        address = _inside(given.get("next", "/"))
        key = given.get("key", "").strip()
        if keys.find(key) is None:
            return site.page("login.html", status=401, here="", next=address, refused=True)
        answer = RedirectResponse(address, status_code=303)
        secure = request.url.scheme == "https"
        answer.set_cookie(COOKIE, key, httponly=True, samesite="strict", secure=secure)
        return answer


def _inside(address: str) -> str:
    """An address of this service: others, and those that only look like one (``//host``), become the start page."""
    return address if address.startswith("/") and not address.startswith(("//", "/\\")) else "/"
