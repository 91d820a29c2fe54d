"""``polyhead evaluate``: strategies and models measured on data with known answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from polyhead.cli.show import console, print_json, progress_bar

if TYPE_CHECKING:
    from polyhead.embed import Encoder
    from polyhead.evaluate.compass import CompassReport
    from polyhead.evaluate.report import Report

app = typer.Typer(
    no_args_is_help=True,
    help="Measure models and strategies on data with known answers, with intervals and tests.",
)

_MODEL = typer.Option(None, "--model", help="Name, folder or .gguf file; again for more, tested against the first.")
_BACKEND = typer.Option("auto", "--backend", help="torch, openvino or auto.")
_LIMIT = typer.Option(None, "--limit", help="Judge by at most so many, drawn by the seed.")
_SEED = typer.Option(0, "--seed", help="Of --limit, the bootstrap and the permutation test.")
_OUT = typer.Option(None, "--out", help="Also write the JSON here.")
_JSON = typer.Option(False, "--json", help="Print JSON on standard output and nothing else.")


@app.callback()
def _group() -> None:
    pass


@app.command("retrieval")
def retrieval(
    data: str = typer.Option(..., "--data", help="mrag-wikipedia, cranfield, limit-small, or a folder in BEIR format."),
    strategy: list[str] = typer.Option(
        None, "--strategy", help="May be given again; by default all of them, or dense with several models."
    ),
    model: list[str] = _MODEL,
    backend: str = _BACKEND,
    seed: int = _SEED,
    out: str = _OUT,
    json_output: bool = _JSON,
) -> None:
    """Rank known questions with each strategy: recall, nDCG, MRR and MAP with 95% intervals and paired tests.

    Example: `polyhead evaluate retrieval --data cranfield --strategy aspects --strategy dense`
    """
    from polyhead.evaluate.models import evaluate_models
    from polyhead.evaluate.run import evaluate_retrieval

    encoders = _encoders(model, backend)
    with progress_bar("Encoding", "texts") as progress:
        if len(encoders) == 1:
            (encoder,) = encoders.values()
            report = evaluate_retrieval(data, encoder, strategies=strategy or None, seed=seed, progress=progress)
        else:
            report = evaluate_models(data, encoders, strategies=strategy or ("dense",), seed=seed, progress=progress)
    _show(report, out, json_output)


@app.command("sts")
def sts(
    data: str = typer.Option(
        "sts-2015", "--data", help="sts-2012 to sts-2015, or a .csv, .tsv or .jsonl of sentence1, sentence2, score."
    ),
    model: list[str] = _MODEL,
    backend: str = _BACKEND,
    limit: int = _LIMIT,
    seed: int = _SEED,
    out: str = _OUT,
    json_output: bool = _JSON,
) -> None:
    """Does the cosine of two sentences follow how alike people find them? Spearman and Pearson, as mteb has them.

    Example: `polyhead evaluate sts --data sts-2015 --model all-MiniLM-L6-v2 --model gemma-3-270m --limit 500`
    """
    _task("sts", data, model, backend, limit, seed, out, json_output)


@app.command("classification")
def classification(
    data: str = typer.Option(
        "banking77", "--data", help="banking77, ag-news, or a .csv, .tsv or .jsonl of text, label (and split)."
    ),
    probe: str = typer.Option("linear", "--probe", help="linear (logistic regression) or knn."),
    samples: int = typer.Option(8, "--samples", help="Of each label to learn from, drawn anew ten times."),
    model: list[str] = _MODEL,
    backend: str = _BACKEND,
    limit: int = _LIMIT,
    seed: int = _SEED,
    out: str = _OUT,
    json_output: bool = _JSON,
) -> None:
    """How well is a label learnt from few vectors? Accuracy and macro F1 of a simple classifier, as mteb has them.

    Example: `polyhead evaluate classification --data banking77 --limit 500 --probe knn`
    """
    _task("classification", data, model, backend, limit, seed, out, json_output, probe=probe, samples=samples)


@app.command("clustering")
def clustering(
    data: str = typer.Option(
        "banking77", "--data", help="As of `classification`; the part to be judged by is clustered."
    ),
    variant: str = typer.Option("bootstrapped", "--variant", help="bootstrapped (ten drawn sets) or whole (one)."),
    model: list[str] = _MODEL,
    backend: str = _BACKEND,
    limit: int = _LIMIT,
    seed: int = _SEED,
    out: str = _OUT,
    json_output: bool = _JSON,
) -> None:
    """Do clusters of the vectors agree with the labels? V-measure of mini-batch k-means, as mteb has it.

    Example: `polyhead evaluate clustering --data ag-news --limit 1000`
    """
    _task("clustering", data, model, backend, limit, seed, out, json_output, variant=variant)


@app.command("pairs")
def pairs(
    data: str = typer.Option(
        "sts-2015",
        "--data",
        help="sts-2012 to sts-2015 (scored 4 and more against 2 and less), or a file of sentence1, sentence2, label.",
    ),
    model: list[str] = _MODEL,
    backend: str = _BACKEND,
    limit: int = _LIMIT,
    seed: int = _SEED,
    out: str = _OUT,
    json_output: bool = _JSON,
) -> None:
    """Does one threshold tell pairs that belong together from others? AP, accuracy and F1, as mteb has them.

    Example: `polyhead evaluate pairs --data my-pairs.csv --model all-MiniLM-L6-v2`
    """
    _task("pairs", data, model, backend, limit, seed, out, json_output)


@app.command("reranking")
def reranking(
    data: str = typer.Option(
        ...,
        "--data",
        help="mrag-wikipedia, cranfield, limit-small or a BEIR folder (100 candidates a question: its relevant "
        "documents and random others), or a .jsonl of query, positive, negative.",
    ),
    model: list[str] = _MODEL,
    backend: str = _BACKEND,
    limit: int = _LIMIT,
    seed: int = _SEED,
    out: str = _OUT,
    json_output: bool = _JSON,
) -> None:
    """Are the right candidates of a question put first? MAP, MRR and nDCG of the order by cosine, as mteb has them.

    Example: `polyhead evaluate reranking --data cranfield --limit 50`
    """
    _task("reranking", data, model, backend, limit, seed, out, json_output)


@app.command("embedders")
def embedders(
    data: str = typer.Option(..., "--data", help="mrag-wikipedia, cranfield, limit-small, or a folder in BEIR format."),
    k: int = typer.Option(5, "--k", help="Passages looked at."),
    model: list[str] = _MODEL,
    backend: str = _BACKEND,
    seed: int = _SEED,
    out: str = _OUT,
    json_output: bool = _JSON,
) -> None:
    """Which encoder for this domain? Accuracy with intervals and tests, thresholds, overlaps and isotropy.

    Example: `polyhead evaluate embedders --data cranfield --model all-MiniLM-L6-v2 --model gemma-3-270m`
    """
    from polyhead.evaluate.compass import compare_embedders
    from polyhead.evaluate.datasets import load_retrieval

    found = compare_embedders(load_retrieval(data), _encoders(model, backend), k=k, seed=seed)
    _show(found, out, json_output)


def _task(
    task: str,
    data: str,
    model: list[str] | None,
    backend: str,
    limit: int | None,
    seed: int,
    out: str | None,
    json_output: bool,
    **options: Any,
) -> None:
    from polyhead.evaluate.tasks import evaluate_task

    with progress_bar("Encoding", "texts") as progress:
        report = evaluate_task(
            task, data, _encoders(model, backend), limit=limit, seed=seed, progress=progress, **options
        )
    _show(report, out, json_output)


def _encoders(model: list[str] | None, backend: str) -> dict[str, Encoder]:
    from polyhead.embed import Encoder
    from polyhead.evaluate.tasks import named
    from polyhead.hub import DEFAULT_MODEL

    return named([Encoder(name, backend=backend) for name in model or [DEFAULT_MODEL]])  # type: ignore[arg-type]


def _show(report: Report | CompassReport, out: str | None, json_output: bool) -> None:
    import json
    from pathlib import Path

    if out:
        Path(out).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    if json_output:
        print_json(report.to_json())
    else:
        console.print(report.table())
