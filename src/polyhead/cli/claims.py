"""``polyhead claims``: small experiments that support or refute what papers report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from polyhead.cli.show import console, errors, print_json

app = typer.Typer(no_args_is_help=True, help="Run the experiments that support or refute what papers report.")


@app.command("list")
def list_claims(json_output: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the papers whose claim can be run here, with their last verdict."""
    from rich.table import Table

    from polyhead.claims import claim_ids
    from polyhead.papers import evidence, find

    rows = []
    for id in claim_ids():
        last = evidence(id)
        rows.append({"id": id, "title": find(id).title, "verdict": last["verdict"] if last else None})
    if json_output:
        print_json(rows)
        return
    table = Table("id", "title", "last verdict", box=None)
    for row in rows:
        table.add_row(row["id"], row["title"], row["verdict"] or "not run")
    console.print(table)


@app.command("run")
def run(
    ids: list[str] = typer.Argument(None, metavar="[ID]...", help="Papers whose claim to run."),
    every: bool = typer.Option(False, "--all", help="Run every claim there is."),
    scale: str = typer.Option("smoke", "--scale", help="smoke (seconds) or full (minutes)."),
    seed: int = typer.Option(0, "--seed", help="Of everything random."),
    jobs: int = typer.Option(1, "--jobs", min=1, help="Claims at once, each in a process of one thread."),
    save: bool = typer.Option(False, "--save", help="Keep the evidence with the paper's card."),
    page: Path = typer.Option(None, "--page", help="Write the table of all kept evidence to this Markdown file."),
    json_output: bool = typer.Option(False, "--json", help="Print JSON on standard output and nothing else."),
) -> None:
    """Run claims and print what was measured, what was expected and the verdict.

    Example: `polyhead claims run mrag --scale full`
    """
    from polyhead.claims.report import page as page_of
    from polyhead.claims.report import run_all, save_evidence
    from polyhead.errors import InputError

    if bool(ids) == every:
        raise InputError("Name the papers whose claims to run, or give --all; `polyhead claims list` names them.")
    if not every:
        from polyhead.claims import claim_ids

        unknown = [id for id in ids if id not in claim_ids()]
        if unknown:
            raise InputError(f"No claim {', '.join(unknown)} here; `polyhead claims list` names those there are.")

    def tell(id: str, result: dict[str, Any] | str) -> None:
        if isinstance(result, dict) and save:
            save_evidence(result)
        if not json_output:
            _show(id, result)

    found, broken = run_all(None if every else ids, scale=scale, seed=seed, jobs=jobs, tell=tell)  # type: ignore[arg-type]
    if page is not None:
        page.write_text(page_of(), encoding="utf-8")
    if json_output:
        print_json({"evidence": list(found.values()), "broken": broken})
    if broken:
        errors.print(f"[bold red]{len(broken)} of {len(found) + len(broken)} claims broke:[/] {', '.join(broken)}")
        raise typer.Exit(1)


def _show(id: str, result: dict[str, Any] | str) -> None:
    from rich.markup import escape

    if isinstance(result, str):
        errors.print(f"[bold red]{id} broke[/]\n{escape(result)}", highlight=False, soft_wrap=True)
        return
    colour = {"supported": "green", "refuted": "red"}.get(result["verdict"], "yellow")
    console.print(f"[bold]{id}[/]  [{colour}]{result['verdict']}[/]  [dim]{result['seconds']} s[/]", highlight=False)
    console.print(f"  expected  {escape(result['expected'])}", highlight=False)
    for label in ("measured", "baseline"):
        for name, value in result[label].items():
            console.print(f"  {label:<9} {escape(name)} {value:.4g}", highlight=False)
    if result["interval"]:
        low, high = result["interval"]
        console.print(f"  interval  {escape(result['decides'])} {low:.4g} to {high:.4g} (95%)", highlight=False)
    where = " · ".join(filter(None, (result["model"], result["data"])))
    console.print(f"  [dim]{escape(where)}[/]", highlight=False)
    if result["notes"]:
        console.print(f"  [dim]{escape(result['notes'])}[/]", highlight=False)
