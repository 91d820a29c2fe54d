"""``polyhead train``: a text encoder trained on a table of texts, into a folder that sentence-transformers opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from polyhead.cli.show import console, print_json, progress_bar


def train(
    model: str = typer.Argument(..., help="Model name, folder or hub id; see `polyhead models`."),
    data: Path = typer.Argument(
        ..., help=".csv, .tsv, .json or .jsonl with columns anchor, positive, ... (see below)."
    ),
    out: Path = typer.Option(..., "--out", help="Folder for the trained model."),
    objective: str = typer.Option(
        "auto",
        "--objective",
        help="auto, infonce, symmetric-infonce, large-batch-infonce, triplet, multi-similarity, contrastive, cosent, "
        "angle.",
    ),
    columns: list[str] = typer.Option(None, "--column", help="ROLE=COLUMN, such as anchor=question; may be repeated."),
    evaluation: Path = typer.Option(None, "--eval", help="Held-out rows like the data, measured before and after."),
    matryoshka: str = typer.Option(None, "--matryoshka", help="Widths trained together, such as 32,128,384."),
    depth: bool = typer.Option(False, "--depth", help="With --matryoshka: earlier layers too (2DMSE)."),
    pooling: str = typer.Option(None, "--pooling", help="Pooling in place of the model's own, such as cls."),
    heads: Path = typer.Option(None, "--heads", help="Train only heads of this map (`polyhead heads measure --out`)."),
    top: int = typer.Option(8, "--top", min=1, help="With --heads: how many."),
    offsets: bool = typer.Option(False, "--offsets", help="With --heads: an offset each (LoFiT), not their weights."),
    head_dropout: int = typer.Option(0, "--head-dropout", min=0, help="Heads of each layer off in every step."),
    batch_size: int = typer.Option(32, "--batch-size", min=1, help="Rows a step."),
    cached: int = typer.Option(None, "--cached", min=1, help="Rows the model sees at once: for batches beyond memory."),
    epochs: float = typer.Option(1.0, "--epochs", help="Passes over the data."),
    steps: int = typer.Option(None, "--steps", min=1, help="Optimiser steps in place of epochs."),
    learning_rate: float = typer.Option(2e-5, "--learning-rate", help="Of AdamW, its highest."),
    max_tokens: int = typer.Option(None, "--max-tokens", min=1, help="A lower limit on input length than the model's."),
    bf16: bool = typer.Option(False, "--bf16", help="Compute the model in bfloat16."),
    device: str = typer.Option(None, "--device", help="cpu, cuda, ...; by default CUDA where there is one."),
    save_every: int = typer.Option(None, "--save-every", min=1, help="Steps between checkpoints; by default an epoch."),
    seed: int = typer.Option(0, "--seed", help="Of everything random."),
    resume: bool = typer.Option(False, "--resume", help="Go on with the run in --out, to the same weights."),
    json_output: bool = typer.Option(False, "--json", help="Print JSON on standard output and nothing else."),
) -> None:
    """Train a text encoder on pairs, triplets, labelled or scored texts.

    Columns are found by name: **anchor, positive** (and **negative**, or **score**), or **text, label**; others with
    `--column anchor=question`. A run that was killed goes on with `--resume` and ends at the same weights.

    Example: `polyhead train all-MiniLM-L6-v2 pairs.csv --out tuned --eval held-out.csv --matryoshka 64,128,384`
    """
    from polyhead.training import Options, Trainer, examples, held_out, trainable
    from polyhead.training.names import objective_for

    rows = examples(data, _columns(columns))
    held = None if evaluation is None else examples(evaluation, _columns(columns))
    trainer = Trainer(
        _cut(objective_for(objective, rows.kind), matryoshka, depth),
        out,
        Options(
            batch_size=batch_size,
            epochs=epochs,
            steps=steps,
            learning_rate=learning_rate,
            bf16=bf16,
            cached=cached,
            save_every=save_every,
            seed=seed,
            max_tokens=max_tokens,
            device=device,
        ),
        tune=_tuning(heads, top, offsets),
        during=_dropout(head_dropout, seed),
    )
    before = {} if held is None else held_out(held)(trainable(model, pooling, device=device, max_tokens=max_tokens))
    with progress_bar("Training", "steps") as progress:
        trainer.fit(model, rows, evaluation=held, pooling=pooling, resume=resume, progress=progress)
    found = {
        "out": str(out),
        "rows": len(rows),
        "kind": rows.kind,
        "steps": trainer.steps_,
        "loss": next((entry["train_loss"] for entry in reversed(trainer.history_) if "train_loss" in entry), None),
        "before": before,
        "after": trainer.metrics_,
    }
    if json_output:
        print_json(found)
    else:
        _show(found)


def _columns(given: list[str] | None) -> dict[str, list[str]] | None:
    """Role -> columns of ``ROLE=COLUMN``; a role may be named several times (negatives)."""
    from polyhead.errors import InputError

    if not given:
        return None
    found: dict[str, list[str]] = {}
    for entry in given:
        role, equals, name = entry.partition("=")
        if not equals:
            raise InputError(f"--column {entry!r}: expected ROLE=COLUMN, such as anchor=question.")
        found.setdefault(role.strip(), []).append(name)
    return found


def _cut(objective: Any, widths: str | None, depth: bool) -> Any:
    from polyhead.errors import InputError
    from polyhead.training import Matryoshka, TwoDMatryoshka

    if widths is None:
        if depth:
            raise InputError("--depth goes with --matryoshka, which says the widths to train.")
        return objective
    try:
        dims = [int(width) for width in widths.split(",")]
    except ValueError as error:
        raise InputError(f"--matryoshka {widths!r}: expected widths such as 32,128,384.") from error
    return TwoDMatryoshka(objective, dims) if depth else Matryoshka(objective, dims)


def _tuning(heads: Path | None, top: int, offsets: bool) -> Any:
    from polyhead.errors import InputError
    from polyhead.headmap import HeadMap
    from polyhead.training import HeadOffsets, HeadWeights

    if heads is None:
        if offsets:
            raise InputError("--offsets goes with --heads, which says the heads to train.")
        return None
    chosen = HeadMap.load(heads).top(top)
    return HeadOffsets(chosen) if offsets else HeadWeights(chosen)


def _dropout(n: int, seed: int) -> list[Any]:
    from polyhead.training import HeadDropout

    return [HeadDropout(n, seed=seed)] if n else []


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    console.print(f"{found['rows']} rows ({found['kind']}), {found['steps']} steps, into [bold]{found['out']}[/]")
    if found["after"]:
        table = Table("held out", "before", "after", box=None)
        for name, value in found["after"].items():
            table.add_row(name, f"{found['before'].get(name, float('nan')):.4f}", f"{value:.4f}")
        console.print(table)
