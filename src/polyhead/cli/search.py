"""``polyhead search`` and ``polyhead index``: the main job."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.markup import escape
from rich.padding import Padding

from polyhead.cli.show import console, errors, print_json, progress_bar

if TYPE_CHECKING:
    from polyhead.embed import Encoder
    from polyhead.search.engine import Hit, SearchResult
    from polyhead.search.index import Index, UpdateReport
    from polyhead.search.late.store import TokenReport

PATH = typer.Argument(
    help="A folder, or one file: .txt .md .rst .html .pdf .docx .json .jsonl .csv .py", show_default=False
)
INDEX = typer.Option(None, "--index", help="Folder or s3:// address of the index; by default below POLYHEAD_HOME.")
MODEL = typer.Option(None, "--model", help="Model name, folder or .gguf file; see `polyhead models`.")
BACKEND = typer.Option("auto", "--backend", help="torch, openvino, or auto: the fastest that agrees with torch here.")
TEXT_FIELD = typer.Option("text", "--text-field", help="Field that holds the text in .json, .jsonl and .csv files.")
INCLUDE = typer.Option(None, "--include", help="Only files that match this glob; may be given again.")
EXCLUDE = typer.Option(None, "--exclude", help="Leave out files and folders that match this glob; may be given again.")
JSON = typer.Option(False, "--json", help="Print JSON on standard output and nothing else.")
EXCERPT = 240
WORDS = 12


def index(
    path: str = PATH,
    index_uri: str = INDEX,
    model: str = MODEL,
    backend: str = BACKEND,
    text_field: str = TEXT_FIELD,
    include: list[str] = INCLUDE,
    exclude: list[str] = EXCLUDE,
    tokens: bool = typer.Option(
        False, "--tokens", help="Keep a vector of every token too, for --strategy late: slow to make, and large."
    ),
    token_precision: str = typer.Option("float16", "--token-precision", help="float16 or int8, of these vectors."),
    rebuild: bool = typer.Option(
        False, "--rebuild", help="Drop the index and make it again, for instance with --model."
    ),
    json_output: bool = JSON,
) -> None:
    """Make an index of documents, or bring it up to date: only new and changed files are read again.

    Interrupted at any moment, the next run goes on where it stopped.

    Example: `polyhead index ~/papers --include "*.pdf"`
    """
    target = _open(path, index_uri)
    encoder = _Lazy(target, model, backend)
    with progress_bar("Indexing", "files") as progress:
        report = target.update(
            path,
            encoder,
            model=model,
            text_field=text_field,
            include=include or None,
            exclude=exclude or None,
            rebuild=rebuild,
            progress=progress,
        )
    made = _make_tokens(target, encoder, token_precision) if tokens else None
    if json_output:
        print_json({"index": target.uri, **report.to_json(), **({"tokens": vars(made)} if made else {})})
        return
    _show_report(report, target.uri)


def search(
    path: str = PATH,
    query: str = typer.Argument(
        help="What you want to know; it may ask for several things at once.", show_default=False
    ),
    k: int = typer.Option(10, "-k", help="How many documents."),
    strategy: str = typer.Option("aspects", "--strategy", help="aspects, dense, heads, vote, parts or late."),
    where: str = typer.Option(
        None, "--where", help="Filter, for instance \"kind = 'pdf' AND modified >= '2026-01-01'\"."
    ),
    explain: bool = typer.Option(
        False, "--explain", help="Show why each document matched, and what the strategy decided."
    ),
    language: str = typer.Option("en", "--language", help="Language of the question, for cutting it into sentences."),
    index_uri: str = INDEX,
    model: str = MODEL,
    backend: str = BACKEND,
    text_field: str = TEXT_FIELD,
    include: list[str] = INCLUDE,
    exclude: list[str] = EXCLUDE,
    no_update: bool = typer.Option(
        False, "--no-update", help="Search the index as it is; do not look for changed files."
    ),
    json_output: bool = JSON,
) -> None:
    """Search documents by every aspect of a question; indexes them first where the index is missing or stale.

    Example: `polyhead search ~/mail "who books the venue, and what does it cost" --explain`
    """
    from polyhead.search.engine import search_index
    from polyhead.search.strategies import strategy as strategy_named

    chosen = strategy_named(strategy)
    target = _open(path, index_uri)
    encoder = _Lazy(target, model, backend)
    report = None
    if not no_update:
        report = _update_for_search(target, path, encoder, model, text_field, include, exclude)
    if chosen.uses_tokens and not no_update:
        _make_tokens(target, encoder, "float16")
    result = search_index(target, query, encoder(), k=k, by=chosen, where=where, language=language, update_tokens=False)
    if json_output:
        print_json({**result.to_json(), "update": report.to_json() if report else None})
        return
    _show_result(result, explain)


class _Lazy:
    """An encoder made when it is first needed, and once: an unchanged folder loads no model."""

    def __init__(self, target: Index, model: str | None, backend: str) -> None:
        self._target, self._model, self._backend = target, model, backend
        self._encoder: Encoder | None = None

    def __call__(self) -> Encoder:
        if self._encoder is None:
            from polyhead.embed import Encoder
            from polyhead.hub import DEFAULT_MODEL

            name = self._model or (self._target.meta.model if self._target.exists() else DEFAULT_MODEL)
            self._encoder = Encoder(name, backend=self._backend)  # type: ignore[arg-type]
        return self._encoder


def _open(path: str, uri: str | None) -> Index:
    from polyhead.search.index import Index, default_index_uri

    return Index(uri or default_index_uri(Path(path).expanduser()))


def _update_for_search(
    target: Index,
    path: str,
    encoder: Callable[[], Encoder],
    model: str | None,
    text_field: str,
    include: list[str] | None,
    exclude: list[str] | None,
) -> UpdateReport | None:
    """Bring the index up to date with the settings it was made with, unless others were asked for."""
    from polyhead.errors import IndexBusyError

    settings = {"text_field": text_field, "include": include or None, "exclude": exclude or None}
    if target.exists() and text_field == "text" and not include and not exclude:
        made = target.meta.settings
        settings = {
            "text_field": made["text_field"],
            "include": made["include"] or None,
            "exclude": made["exclude"] or None,
        }
    try:
        with progress_bar("Indexing", "files") as progress:
            report = target.update(path, encoder, model=model, progress=progress, **settings)  # type: ignore[arg-type]
    except IndexBusyError as busy:
        if not target.exists():
            raise
        errors.print(f"[yellow]{escape(str(busy))} Searching the last committed state.[/]")
        return None
    if report.chunks or report.removed:
        _show_report(report, target.uri, to=errors)
    return report


def _make_tokens(target: Index, encoder: Callable[[], Encoder], precision: str) -> TokenReport | None:
    """Bring the token vectors up to date, and say what that was for where it took time."""
    from polyhead.errors import IndexBusyError

    first = not target.tokens.exists()
    if first:
        errors.print(
            f"Making a vector of every token of {_count(target.store.count(), 'chunk')}, once: slower than indexing, "
            "and many times its size. Later runs encode only what changed.",
            highlight=False,
        )
    try:
        with progress_bar("Token vectors", "chunks") as progress:
            report = target.update_tokens(encoder(), precision=precision, progress=progress)  # type: ignore[arg-type]
    except IndexBusyError as busy:
        if first:
            raise
        errors.print(f"[yellow]{escape(str(busy))} Searching the token vectors there are.[/]")
        return None
    if report.encoded or report.removed:
        errors.print(
            f"Token vectors of {_count(report.total, 'chunk')}: {report.encoded:,} encoded, {report.removed:,} removed",
            highlight=False,
        )
    return report


def _show_report(report: UpdateReport, uri: str, to: object = console) -> None:
    out = to if to is errors else console
    out.print(
        f"{_count(report.total_chunks, 'chunk')} in the index: {_count(report.added, 'file')} added, "
        f"{report.changed:,} changed, {report.removed:,} removed, {report.unchanged:,} unchanged "
        f"({report.seconds:.1f} s)",
        highlight=False,
    )
    if report.empty:
        out.print(f"{_count(report.empty, 'file')} without text of their own.", highlight=False)
    if report.skipped:
        kinds = sorted(report.skipped.items(), key=lambda item: -item[1])
        named = ", ".join(f"{count:,} {suffix}" for suffix, count in kinds[:8])
        more = f" and {len(kinds) - 8} other kinds" if len(kinds) > 8 else ""
        out.print(f"Not read, as their kind is not supported: {escape(named)}{more}", highlight=False)
    if report.problems:
        out.print(f"[yellow]{_count(len(report.problems), 'problem')} while reading:[/]")
        for problem in report.problems[:20]:
            out.print(f"  {escape(str(problem))}", highlight=False, soft_wrap=True)
        if len(report.problems) > 20:
            out.print(f"  ... and {len(report.problems) - 20:,} more; --json lists all")
    out.print(f"[dim]index: {escape(uri)}[/]", highlight=False, soft_wrap=True)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _show_result(result: SearchResult, explain: bool) -> None:
    if not result.hits:
        console.print(f"No document found ({escape(result.plan)}).")
        return
    for hit in result.hits:
        _show_hit(hit, explain)
    if explain:
        took = ", ".join(f"{name} {seconds * 1000:.0f} ms" for name, seconds in result.seconds.items())
        console.print(f"\n[bold]How it was decided[/]  {escape(result.decision)}", highlight=False)
        console.print(
            f"[dim]{result.strategy}: {result.parts} parts; {escape(result.plan)}; {took}[/]", highlight=False
        )


def _show_hit(hit: Hit, explain: bool) -> None:
    title = hit.title or hit.document
    where = hit.path if hit.heading in (None, title) else f"{hit.path} › {hit.heading}"
    console.print(f"[bold]{hit.rank:>2}. {escape(title)}[/]  [dim]{escape(where)}[/]", highlight=False)
    excerpt = textwrap.shorten(hit.text, EXCERPT, placeholder=" …")
    console.print(Padding(escape(excerpt), (0, 0, 0, 4)), highlight=False)
    answers = f"answers “{escape(hit.answers)}”" if hit.answers else "answers the whole question"
    console.print(Padding(f"[green]{answers}[/]", (0, 0, 0, 4)), highlight=False)
    if explain:
        heads = ", ".join(f"L{h.layer}H{h.head} {h.share:.0%}" for h in hit.heads)
        terms = ", ".join(f"{name} {value:.2f}" for name, value in hit.terms.items() if value)
        spoke = f"heads {heads}; " if heads else ""
        if hit.words:
            met = sorted(hit.words, key=lambda word: -word.similarity)[:WORDS]
            said = ", ".join(f"{word.query} → {word.document} {word.similarity:.2f}" for word in met)
            console.print(Padding(f"[dim]words {escape(said)}[/]", (0, 0, 0, 4)), highlight=False)
        console.print(Padding(f"[dim]{spoke}cosine {hit.similarity:.2f}; {terms}[/]", (0, 0, 0, 4)), highlight=False)
