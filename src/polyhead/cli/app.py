"""The commands and their help texts. Each command imports what it needs when it runs, so that ``--help`` is quick."""

from __future__ import annotations

import typer

from polyhead import __version__
from polyhead.cli import attention, claims, evaluate, heads, lab, models, papers, search, serve, train

app = typer.Typer(
    name="polyhead",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Search documents by every aspect of a question, with the attention heads of a Transformer.

**Start here**

- `polyhead search ~/notes "who reviews the budget, and when is it due"` indexes the folder once, then answers
- `polyhead search ~/notes "..." --explain` shows which part of the question each hit answers, and which heads agreed
- `polyhead evaluate retrieval --data mrag-wikipedia` measures the strategies against each other, with intervals

Every command takes `--help`; those that print a result take `--json`.""",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"polyhead {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


app.command("search")(search.search)
app.command("index")(search.index)
app.add_typer(evaluate.app, name="evaluate")
app.command("serve")(serve.serve)
app.command("models")(models.models)
app.command("papers")(papers.papers)
app.add_typer(heads.app, name="heads")
app.add_typer(attention.app, name="attention")
app.add_typer(claims.app, name="claims")
app.add_typer(lab.app, name="lab")
app.command("train")(train.train)
