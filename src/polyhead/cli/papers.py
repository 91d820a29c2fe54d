"""``polyhead papers``: the catalogue of papers behind the code."""

from __future__ import annotations

import typer

from polyhead.cli.show import console


def papers(
    paper_id: str = typer.Argument(None, metavar="[ID]", help="Explain this paper; without it, list all."),
    family: str = typer.Option(None, help="Only this family, for instance 'pooling'."),
    state: str = typer.Option(None, help="Only these: planned, partial or works."),
    words: str = typer.Option("", "--find", help="Only papers whose card holds these words."),
    json_output: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """List the papers Polyhead builds on, or explain one with its code, state and latest evidence.

    Example: `polyhead papers --family index`, then `polyhead papers mrag`.
    """
    from polyhead import papers as catalogue

    if paper_id:
        card = catalogue.find(paper_id)
        if json_output:
            typer.echo(catalogue.to_json(card))
        else:
            console.print(catalogue.explain(card))
        return
    cards = catalogue.search_papers(words, family=family, state=state)
    if json_output:
        typer.echo(catalogue.to_json(cards))
    else:
        console.print(catalogue.table(cards))
