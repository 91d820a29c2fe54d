"""What every request passes before it is read: its size, its key, its count; and what is counted after it."""

from __future__ import annotations

import contextlib
import math
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response

from polyhead.serve.pages.login import COOKIE

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from polyhead.serve.keys import KeyRing
    from polyhead.serve.metrics import Metrics

__all__ = ["Guard", "failure"]

OPEN = ("/health", "/ready", "/login")


def failure(status: int, kind: str, message: str, **headers: str) -> JSONResponse:
    """An error as OpenAI's clients read it, with the message where Cohere's look for it."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}, "message": message}
    return JSONResponse(body, status, headers=headers or None)


class _TooLargeError(Exception):
    pass


class Guard:
    """ASGI middleware.

    Args:
        app: the application.
        metrics: where requests are counted.
        keys: who may ask; None lets everybody.
        body_bytes: most bytes of a request.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, keys: KeyRing | None, body_bytes: int) -> None:
        self.app, self.metrics, self.keys, self.body_bytes = app, metrics, keys, body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._guarded(scope, receive, sent)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, scope["method"], str(status)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - started)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refusal(HTTPConnection(scope))
        if refused is not None:
            await refused(scope, receive, send)
            return
        left, began = self.body_bytes, False

        async def counted() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise _TooLargeError
            return message

        async def sent(message: Message) -> None:
            nonlocal began
            if left >= 0 or began:  # what the application says of a body that was cut off is not the answer
                began = True
                await send(message)

        with contextlib.suppress(_TooLargeError):
            await self.app(scope, counted, sent)
        if left < 0 and not began:
            await self._too_large()(scope, receive, send)

    def _refusal(self, asked: HTTPConnection) -> Response | None:
        path, headers = asked.scope["path"], asked.headers
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.body_bytes:
            return self._too_large()
        if self.keys is None or path in OPEN or path.startswith("/static/"):
            return None
        found = self.keys.find(_key(asked))
        if found is None and "text/html" in headers.get("accept", ""):
            return RedirectResponse(f"/login?next={quote(path)}", status_code=303)
        if found is None:
            message = "This service asks for a key: send the header 'Authorization: Bearer KEY'."
            return failure(401, "authentication_error", message, **{"WWW-Authenticate": "Bearer"})
        wait: Any = found[1].take()
        if wait > 0:
            message = f"The key '{found[0]}' may make {found[1].per_minute} requests a minute; wait {wait:.1f} s."
            return failure(429, "rate_limit_error", message, **{"Retry-After": str(math.ceil(wait))})
        return None

    def _too_large(self) -> JSONResponse:
        message = f"The request is larger than the {self.body_bytes:,} bytes this service takes; send less at once."
        return failure(413, "request_too_large", message)


def _key(asked: HTTPConnection) -> str:
    """The key that a program sends as a header, or a browser as a cookie; "" where there is none."""
    scheme, _, given = asked.headers.get("authorization", "").partition(" ")
    return given.strip() if scheme.lower() == "bearer" else asked.cookies.get(COOKIE, "")
