"""``polyhead lab``: theories of attention, tried on toy data and drawn."""

from __future__ import annotations

from pathlib import Path

import typer

from polyhead.cli.show import console, print_json

app = typer.Typer(no_args_is_help=True, help="Try theories of attention on toy data; each run draws its plot.")


@app.command("list")
def list_experiments(json_output: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the experiments and what each asks."""
    from rich.table import Table

    from polyhead.lab import experiments

    rows = [{"id": one.id, "question": one.question} for one in experiments().values()]
    if json_output:
        print_json(rows)
        return
    table = Table("id", "asks", box=None)
    for row in rows:
        table.add_row(row["id"], row["question"])
    console.print(table)


@app.command("run")
def run(
    id: str = typer.Argument(help="Which, as `polyhead lab list` names it.", show_default=False),
    scale: str = typer.Option("smoke", "--scale", help="smoke (seconds) or full (up to five minutes)."),
    seed: int = typer.Option(0, "--seed", help="Of everything random."),
    out: Path = typer.Option(None, "--out", help="Write the plot here: .png, .svg or .pdf."),
    json_output: bool = typer.Option(False, "--json", help="Print JSON on standard output and nothing else."),
) -> None:
    """Run one experiment: what was measured beside what the theory says, and its plot.

    Example: `polyhead lab run low-rank-bottleneck --out rank.png`
    """
    from rich.markup import escape
    from rich.table import Table

    from polyhead.errors import InputError
    from polyhead.lab import draw, find

    experiment = find(id)
    if scale not in ("smoke", "full"):
        raise InputError(f"--scale {scale} was given, expected smoke or full.")
    if out is not None and out.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--out {out} was given, expected a name that ends in .png, .svg or .pdf.")
    with console.status(f"Running {id}"):
        evidence = experiment.run(scale, seed)  # type: ignore[arg-type]
    if out is not None:
        draw(experiment, evidence, out)
    if json_output:
        print_json({"id": id, "scale": scale, "seed": seed, **vars(evidence), "plot": str(out) if out else None})
        return
    table = Table("measured", "value", box=None, title=experiment.question, title_justify="left")
    for name, value in {**evidence.measured, **evidence.baseline}.items():
        table.add_row(escape(name), f"{value:.4g}")
    console.print(table)
    interval = "" if evidence.interval is None else f" [{evidence.interval[0]:.3g}, {evidence.interval[1]:.3g}]"
    console.print(f"expected: {escape(evidence.expected)}", highlight=False)
    console.print(f"[bold]{evidence.verdict}[/]: {escape(evidence.decides)}{escape(interval)}", highlight=False)
    if evidence.notes:
        console.print(f"[dim]{escape(evidence.notes)}[/]", highlight=False)
    if out is not None:
        console.print(f"plot: {escape(str(out))}", highlight=False)
