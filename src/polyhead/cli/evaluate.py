"""``polyhead evaluate``: strategies measured on data with known answers."""

from __future__ import annotations

import typer

from polyhead.cli.show import console, print_json, progress_bar

app = typer.Typer(no_args_is_help=True, help="Measure strategies on data with known answers, with intervals and tests.")


@app.callback()
def _group() -> None:
    pass


@app.command("retrieval")
def retrieval(
    data: str = typer.Option(..., "--data", help="mrag-wikipedia, cranfield, limit-small, or a folder in BEIR format."),
    strategy: list[str] = typer.Option(None, "--strategy", help="May be given again; by default all of them."),
    model: str = typer.Option(None, "--model", help="Model name, folder or .gguf file; see `polyhead models`."),
    backend: str = typer.Option("auto", "--backend", help="torch, openvino or auto."),
    seed: int = typer.Option(0, "--seed", help="Of the bootstrap and the permutation test."),
    out: str = typer.Option(None, "--out", help="Also write the JSON here."),
    json_output: bool = typer.Option(False, "--json", help="Print JSON on standard output and nothing else."),
) -> None:
    """Rank known questions with each strategy: recall, nDCG, MRR and MAP with 95% intervals and paired tests.

    Example: `polyhead evaluate retrieval --data cranfield --strategy aspects --strategy dense`
    """
    import json
    from pathlib import Path

    from polyhead.embed import Encoder
    from polyhead.evaluate.run import evaluate_retrieval
    from polyhead.hub import DEFAULT_MODEL

    encoder = Encoder(model or DEFAULT_MODEL, backend=backend)  # type: ignore[arg-type]
    with progress_bar("Encoding", "texts") as progress:
        report = evaluate_retrieval(data, encoder, strategies=strategy or None, seed=seed, progress=progress)
    if out:
        Path(out).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    if json_output:
        print_json(report.to_json())
    else:
        console.print(report.table())
