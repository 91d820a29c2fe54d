"""``polyhead attention``: the mechanisms, and what they cost against tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from polyhead.cli.show import console, print_json, progress_bar
from polyhead.errors import InputError

app = typer.Typer(no_args_is_help=True, help="List attention mechanisms and measure what they cost.")
JSON = typer.Option(False, "--json", help="Print JSON on standard output and nothing else.")


@app.command("list")
def list_mechanisms(json_output: bool = JSON) -> None:
    """List every attention mechanism: what it changes, how its time grows, and its papers."""
    from rich.table import Table

    from polyhead.attention import mechanisms

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "class": kind.__name__,
            "time grows with": kind.cost,
            "summary": kind.summary,
            "papers": list(kind.__dict__.get("__papers__", ())),
        }
        for name, kind in mechanisms().items()
    ]
    if json_output:
        print_json(rows)
        return
    table = Table("name", "class", "time grows with", "what it is", "paper", box=None)
    for row in rows:
        cells = (str(row[key]) for key in ("name", "class", "time grows with", "summary"))
        table.add_row(*cells, ", ".join(row["papers"]))
    console.print(table)


@app.command("bench")
def bench_command(
    names: list[str] = typer.Argument(None, help="Mechanisms; none for all. See `polyhead attention list`."),
    tokens: str = typer.Option("256,1024,4096,16384", "--tokens", help="Lengths, separated by commas."),
    dim: int = typer.Option(256, "--dim", min=8, help="Features of a token."),
    heads: int = typer.Option(4, "--heads", min=1, help="Query heads."),
    both: bool = typer.Option(False, "--both", help="See both directions in place of causal attention."),
    rounds: int = typer.Option(3, "--rounds", min=1, help="Timed passes each; the median counts."),
    out: Path = typer.Option(None, "--out", help="Write the figures here, as JSON."),
    json_output: bool = JSON,
) -> None:
    """Time, peak memory and cache bytes of mechanisms against tokens, beside plain attention through SDPA.

    Example: `polyhead attention bench linear gqa --tokens 256,1024,4096`
    """
    from polyhead.attention.bench import bench, crossover, growth

    layers = _layers(names or [], dim, heads, not both)
    lengths = _lengths(tokens)
    with progress_bar("Measuring", "runs") as progress:
        rows = bench(layers, lengths, rounds=rounds, progress=progress)
    found = {
        "dim": dim,
        "heads": heads,
        "causal": not both,
        "rows": [row.to_json() for row in rows],
        "growth": {name: growth(rows, name) for name in layers},
        "faster than SDPA from tokens": {name: crossover(rows, name) for name in layers},
    }
    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n")
    if json_output:
        print_json(found)
        return
    _show(found, lengths)


def _layers(names: list[str], dim: int, heads: int, causal: bool) -> dict[str, Any]:
    from polyhead.attention import AttentionShape, mechanisms

    known = mechanisms()
    for name in names:
        if name not in known:
            raise InputError(f"'{name}' was given; expected mechanisms of this list: {', '.join(known)}.")
    layers = {}
    for name in names or known:
        kind = known[name]
        if causal or kind.both_directions:
            layers[name] = kind(AttentionShape(dim, heads), causal=causal)
    if not layers:
        raise InputError(f"{', '.join(names)}: defined for causal attention only; leave out --both.")
    return layers


def _lengths(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise InputError(f"--tokens '{text}' was given; expected whole numbers like 256,1024.") from None


def _show(found: dict[str, Any], lengths: list[int]) -> None:
    from rich.table import Table

    table = Table("mechanism", "tokens", "ms", "x SDPA", "peak MiB", "cache KiB", box=None)
    for row in found["rows"]:
        cache = "" if row["cache_bytes"] is None else f"{row['cache_bytes'] / 1024:,.0f}"
        table.add_row(
            row["name"],
            f"{row['tokens']:,}",
            f"{row['milliseconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['peak_mib']:,.0f}",
            cache,
        )
    console.print(table)
    for name, power in found["growth"].items():
        at = found["faster than SDPA from tokens"][name]
        where = (
            f"faster than SDPA from {at:,} tokens on" if at else f"not faster than SDPA up to {max(lengths):,} tokens"
        )
        grows = "" if power is None else f"time grows as tokens^{power:.2f}; "
        left = len(lengths) - sum(row["name"] == name for row in found["rows"])
        out = f"; left out at the longest {left}, which would take over a minute or are refused" if left else ""
        console.print(f"{name}: {grows}{where}{out}")
