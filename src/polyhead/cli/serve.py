"""``polyhead serve``: one process that answers programs over HTTP."""

from __future__ import annotations

from pathlib import Path

import typer

from polyhead.cli.show import console, errors


def serve(
    path: str = typer.Argument(None, help="Folder or file whose index is served; `polyhead search` made it."),
    index_uri: str = typer.Option(None, "--index", help="Folder or s3:// address of the index, instead of PATH."),
    model: str = typer.Option(None, "--model", help="Model; by default the one the index was made with."),
    backend: str = typer.Option("auto", "--backend", help="torch, openvino, or auto: the fastest that agrees here."),
    host: str = typer.Option("127.0.0.1", "--host", help="Address to listen on; beyond this machine only with --keys."),
    port: int = typer.Option(8000, "--port", help="Port to listen on; 0 takes a free one."),
    keys: Path = typer.Option(None, "--keys", help="File of API keys; without one, only this machine may ask."),
    add_key: str = typer.Option(None, "--add-key", help="Make a key of this name, print it once, and end."),
    per_minute: int = typer.Option(0, "--per-minute", help="With --add-key: requests a minute; 0 for no limit."),
    seconds: float = typer.Option(120.0, "--seconds", help="Longest time a request may take."),
    body_mb: float = typer.Option(8.0, "--body-mb", help="Largest request, in MiB."),
    waiting: int = typer.Option(4096, "--waiting", help="Most texts in the queue; beyond it, 429 with Retry-After."),
) -> None:
    """Serve embeddings, reranking and search over HTTP, as OpenAI's, Cohere's and Jina's clients ask for them.

    POST /v1/embeddings, /v1/rerank, /search, /index; GET /heads, /health, /ready, /metrics, /openapi.json.

    Example: `polyhead serve ~/notes`, then
    `curl localhost:8000/search -H 'content-type: application/json' -d '{"query": "who reviews the budget"}'`
    """
    from polyhead.errors import InputError, MissingExtraError

    try:
        import uvicorn

        from polyhead.serve import KeyRing, Limits, Service, create_app, is_loopback
        from polyhead.serve import add_key as make_key
    except ImportError as error:
        raise MissingExtraError(f"Serving needs the extra 'serve' ({error}): pip install 'polyhead[serve]'") from error

    if add_key is not None:
        if keys is None:
            raise InputError("--add-key needs --keys FILE, where the hash of the key is kept.")
        key = make_key(keys, add_key, per_minute)
        errors.print(f"Key '{add_key}' is in {keys} as a hash. This is the only time it is shown:")
        typer.echo(key)
        return
    if keys is None and not is_loopback(host):
        raise InputError(
            f"--host {host} can be reached from other machines, and no keys were given. Make one with "
            "--add-key NAME --keys FILE and serve with --keys FILE, or listen on 127.0.0.1."
        )
    limits = Limits(body_bytes=int(body_mb * 2**20), waiting=waiting, seconds=seconds)
    index, encoder = _opened(path, index_uri, model, backend)
    service = Service(encoder, index, limits=limits)
    app = create_app(service, keys=KeyRing(keys) if keys else None, local_only=is_loopback(host))
    searched = f" and the index {index.uri}" if index is not None else ""
    console.print(f"Serving {service.model}{searched} on http://{host}:{port} (Ctrl-C ends it)", soft_wrap=True)
    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_keep_alive=30)


def _opened(path: str | None, index_uri: str | None, model: str | None, backend: str):  # type: ignore[no-untyped-def]
    from polyhead.embed import Encoder
    from polyhead.hub import DEFAULT_MODEL
    from polyhead.search.index import Index, default_index_uri

    index = None
    if index_uri is not None or path is not None:
        index = Index(index_uri if index_uri is not None else default_index_uri(str(path)))
        if index.exists() and model is None:
            model = index.meta.model
    return index, Encoder(model or DEFAULT_MODEL, backend=backend)  # type: ignore[arg-type]
