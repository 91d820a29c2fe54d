"""The service as an ASGI application: routes, errors, start and end."""

from __future__ import annotations

import asyncio
import base64
import math
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from polyhead import __version__
from polyhead.errors import (
    IndexBusyError,
    IndexMismatchError,
    IndexStorageError,
    InputError,
    PolyheadError,
)
from polyhead.evaluate.vectors import unit
from polyhead.serve import shapes
from polyhead.serve.batching import BusyError, ClosedError, Options
from polyhead.serve.guard import Guard, failure
from polyhead.serve.pages.login import add_login
from polyhead.serve.pages.site import Site, add_pages, wants_page

if TYPE_CHECKING:
    from polyhead.embed import Embeddings
    from polyhead.serve.keys import KeyRing
    from polyhead.serve.service import Service

__all__ = ["create_app"]

_T = TypeVar("_T")
_STATUS: dict[type[PolyheadError], tuple[int, str]] = {
    BusyError: (429, "busy"),
    ClosedError: (503, "shutting_down"),
    IndexBusyError: (409, "index_busy"),
    IndexMismatchError: (409, "index_mismatch"),
    IndexStorageError: (507, "index_storage"),
    InputError: (422, "invalid_request_error"),
    PolyheadError: (500, "server_error"),
}
_FAILURES: dict[int | str, dict[str, Any]] = {
    status: {"model": shapes.Failure, "description": text}
    for status, text in {
        400: "Cannot be read.",
        401: "No key, or an unknown one.",
        409: "The index cannot be changed now.",
        413: "Too large.",
        422: "Cannot be used as given.",
        429: "Too much at once; see the header Retry-After.",
        503: "Took too long, or shutting down.",
        507: "The index cannot be written or read.",
    }.items()
}


def create_app(service: Service, *, keys: KeyRing | None = None, local_only: bool = True) -> FastAPI:
    """The application over a service, which it warms at the start and closes at the end.

    Args:
        service: does the work.
        keys: who may ask; None lets everybody who can reach it.
        local_only: refuse requests that name another host than this machine (a web page that resolves its own name
            to 127.0.0.1 must not reach a service without keys).
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(service.warm)
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(
        title="Polyhead", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, responses=_FAILURES
    )
    site = add_pages(app, service)
    if keys is not None:
        add_login(app, site, keys)
    _add_errors(app, site)
    _add_state(app, service)
    _add_vectors(app, service)
    _add_search(app, service)
    if local_only and keys is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "testserver"])
    app.add_middleware(Guard, metrics=service.metrics, keys=keys, body_bytes=service.limits.body_bytes)
    return app


def _add_errors(app: FastAPI, site: Site) -> None:
    def answer(request: Request, status: int, kind: str, message: str, **headers: str) -> Response:
        """As a person or a program reads it."""
        if not wants_page(request):
            return failure(status, kind, message, **headers)
        title = "The service failed here" if status >= 500 else "This cannot be answered"
        return site.trouble(status, title, message, part="hx-request" in request.headers)

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[:5]
        if any(one["type"] == "json_invalid" for one in first):
            return answer(request, 400, "invalid_request_error", f"The body is no JSON: {first[0]['ctx']['error']}.")
        told = "; ".join(f"{'.'.join(str(step) for step in one['loc'][1:]) or 'body'}: {one['msg']}" for one in first)
        return answer(request, 422, "invalid_request_error", f"The request cannot be used as given: {told}.")

    @app.exception_handler(PolyheadError)
    async def told(request: Request, error: PolyheadError) -> Response:
        status, kind = next(_STATUS[base] for base in type(error).__mro__ if base in _STATUS)
        wait = {"Retry-After": str(math.ceil(error.retry_after))} if isinstance(error, BusyError) else {}
        return answer(request, status, kind, str(error), **wait)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        said = f"There is nothing at {request.url.path}." if error.status_code == 404 else str(error.detail)
        return answer(request, error.status_code, "invalid_request_error", said, **(error.headers or {}))

    @app.exception_handler(TimeoutError)
    async def late(request: Request, error: TimeoutError) -> Response:
        return answer(request, 503, "timeout", "This took longer than the service allows; ask for less at once.")

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        said = f"The service failed ({type(error).__name__}); its log says more. Nothing that was accepted is lost."
        return answer(request, 500, "server_error", said)


def _add_state(app: FastAPI, service: Service) -> None:
    def state(status: str) -> shapes.StateAnswer:
        return shapes.StateAnswer(status=status, model=service.model, version=__version__)

    @app.get("/health", response_model=shapes.StateAnswer)
    async def health() -> shapes.StateAnswer:
        """Whether the process answers."""
        return state("ok")

    @app.get("/ready", response_model=shapes.StateAnswer)
    async def ready() -> Any:
        """Whether it takes work: the model is loaded, and it is not shutting down."""
        if not service.ready:
            return failure(503, "not_ready", "The model is not loaded yet, or the service is shutting down.")
        return state("ready")

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def metrics() -> Response:
        """Counters in Prometheus' format."""
        return Response(service.metrics.page(), media_type=service.metrics.content_type)

    @app.get("/heads", response_model=shapes.HeadsAnswer)
    def heads() -> dict[str, Any]:
        """The model's heads, and what was measured of them."""
        return service.heads()


def _add_vectors(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model, as OpenAI's clients list them."""
        return {"object": "list", "data": [{"id": service.model, "object": "model", "owned_by": "polyhead"}]}

    @app.post("/v1/embeddings", response_model=shapes.EmbeddingsAnswer)
    async def embeddings(request: shapes.EmbeddingsRequest) -> Any:
        """Vectors of texts or token ids, in their order."""
        inputs, ids = _inputs(request.input)
        _at_most("input", len(inputs), service.limits.inputs)
        dim = service.encoder.dim
        if request.dimensions is not None and request.dimensions > dim:
            raise InputError(f"dimensions is {request.dimensions}; {service.model} gives {dim}, ask for at most that.")
        found: Embeddings = await _within(service, asyncio.wrap_future(service.embed(inputs, Options(ids=ids))))
        tokens = sum(map(len, inputs)) if ids else await run_in_threadpool(service.count_tokens, inputs)
        vectors = _shortened(found.dense, request.dimensions)
        as_text = request.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": number, "embedding": _base64(row) if as_text else row.tolist()}
            for number, row in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": service.model, "usage": usage})

    @app.post("/v1/rerank", response_model=shapes.RerankAnswer, response_model_exclude_none=True)
    @app.post("/v2/rerank", response_model=shapes.RerankAnswer, response_model_exclude_none=True)
    async def rerank(request: shapes.RerankRequest) -> dict[str, Any]:
        """Documents by their relevance to a question, best first."""
        texts = [one if isinstance(one, str) else one.text for one in request.documents]
        _at_most("documents", len(texts), service.limits.documents)
        scores = await _within(service, run_in_threadpool(service.rerank, request.query, texts, request.strategy))
        tokens = await run_in_threadpool(service.count_tokens, [request.query, *texts])
        order = np.argsort(-scores, kind="stable")[: request.top_n]
        results = [
            {
                "index": int(one),
                "relevance_score": float(scores[one]),
                "document": {"text": texts[one]} if request.return_documents else None,
            }
            for one in order
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"id": str(uuid.uuid4()), "model": service.model, "results": results, "usage": usage, "meta": {}}


def _add_search(app: FastAPI, service: Service) -> None:
    from polyhead.search.posted import POSTED, Posted

    @app.post("/search", response_model=shapes.SearchAnswer)
    async def search(request: shapes.SearchRequest) -> dict[str, Any]:
        """The best documents of the index for a question, by every aspect of it."""
        _at_most("k", request.k, service.limits.hits)
        options = request.model_dump(exclude={"query", "explain"})
        found = (await _within(service, run_in_threadpool(lambda: service.search(request.query, **options)))).to_json()
        for hit in found["hits"]:
            hit["document"] = str(hit["document"]).removeprefix(POSTED)
            if not request.explain:
                for name in ("heads", "terms", "words"):
                    hit.pop(name, None)
        return dict(found)

    @app.post("/index", response_model=shapes.ChangeAnswer)
    async def change(request: shapes.ChangeRequest) -> dict[str, Any]:
        """Put documents into the index, or remove some; when this answers, the change is on disk."""
        _at_most("documents", len(request.documents), service.limits.documents)
        _at_most("remove", len(request.remove), service.limits.documents)
        documents = [Posted(**document.model_dump()) for document in request.documents]
        if not documents and not request.remove:
            raise InputError("Neither documents nor remove was given; give at least one of them.")
        # Not under a time limit: what was accepted is finished, and its answer says so.
        report, removed = await run_in_threadpool(service.change, documents, request.remove)
        counts = {name: getattr(report, name, 0) for name in ("added", "changed", "chunks", "total_chunks")}
        if report is None:
            counts["total_chunks"] = await run_in_threadpool(service.chunks)
        return {**counts, "removed": removed}


async def _within(service: Service, work: Awaitable[_T]) -> _T:
    return await asyncio.wait_for(work, service.limits.seconds)


def _at_most(name: str, given: int, most: int) -> None:
    if given > most:
        raise InputError(f"{name} is {given:,}; at most {most:,} are taken at once.")


def _inputs(given: Any) -> tuple[list[Any], bool]:
    """The inputs of a request as a list, and whether they are token ids."""
    if isinstance(given, str):
        return [given], False
    if isinstance(given[0], int):
        return [given], True
    return list(given), isinstance(given[0], list)


def _shortened(vectors: np.ndarray, dimensions: int | None) -> np.ndarray:
    if dimensions is None or dimensions == vectors.shape[1]:
        return vectors
    return unit(vectors[:, :dimensions])


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()
