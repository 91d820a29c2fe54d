"""Run many claims, keep their evidence with the cards, and write the published table."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from polyhead.claims.base import Scale, claim_ids, run_claim
from polyhead.papers import find
from polyhead.papers.cards import EVIDENCE

__all__ = ["page", "run_all", "save_evidence"]


def run_all(
    ids: Sequence[str] | None = None,
    *,
    scale: Scale = "smoke",
    seed: int = 0,
    jobs: int = 1,
    tell: Callable[[str, dict[str, Any] | str], None] = lambda id, result: None,
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Run claims; one that breaks does not stop the others.

    Args:
        ids: which; all where None.
        scale, seed: see :func:`run_claim`.
        jobs: how many at once; above 1, each in a process of one thread that keeps its loaded models.
        tell: called with each id and its evidence, or the traceback of what went wrong.

    Returns:
        Evidence by id, and tracebacks by id.
    """
    found: dict[str, dict[str, Any]] = {}
    broken: dict[str, str] = {}

    def note(id: str, result: dict[str, Any] | str) -> None:
        if isinstance(result, str):
            broken[id] = result
        else:
            found[id] = result
        tell(id, result)

    chosen = claim_ids() if ids is None else ids
    if jobs == 1:
        for id in chosen:
            note(id, _attempt(id, scale, seed))
        return found, broken
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        waiting = {pool.submit(_attempt, id, scale, seed): id for id in chosen}
        for done in as_completed(waiting):
            note(waiting[done], done.result())
    return found, broken


def _attempt(id: str, scale: Scale, seed: int) -> dict[str, Any] | str:
    """A claim's evidence, or the traceback of what went wrong."""
    try:
        return run_claim(id, scale=scale, seed=seed)
    except Exception:
        return traceback.format_exc()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def save_evidence(evidence: dict[str, Any], folder: Path = EVIDENCE) -> Path:
    """Write one claim's evidence where ``polyhead papers ID`` finds it; a smoke run does not replace a full one."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{evidence['id']}.json"
    if evidence["scale"] == "smoke" and file.is_file() and json.loads(file.read_text())["scale"] == "full":
        return file
    file.write_text(json.dumps(evidence, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def page(folder: Path = EVIDENCE) -> str:
    """The table of all evidence kept in ``folder``, as a Markdown page."""
    kept = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    lines = [
        "# Claims",
        "",
        "What papers report, tried here at small scale. A claim is a file in `polyhead/claims/`; `polyhead claims run`",
        "repeats one, `make claims` runs all and writes this page. A refuted claim is a result: it stands as measured.",
        "",
        "| paper | verdict | measured | beside | 95% interval | on |",
        "|---|---|---|---|---|---|",
    ]
    for one in kept:
        interval = "" if one["interval"] is None else f"{one['interval'][0]:.3g} to {one['interval'][1]:.3g}"
        if interval and one["decides"]:
            interval = f"{one['decides']}: {interval}"
        where = " · ".join(filter(None, (one["model"], one["data"], f"{one['scale']}, seed {one['seed']}")))
        cells = (
            f"`{one['id']}`",
            one["verdict"],
            _figures(one["measured"]),
            _figures(one["baseline"]),
            interval,
            where,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "## What was expected, and what limits the verdict", ""]
    for one in kept:
        expected = one["expected"].strip().rstrip(".")
        note = f" {one['notes'].strip()}" if one["notes"] else ""
        lines += [f"- **{find(one['id']).title}** (`{one['id']}`): expected {expected}.{note}"]
    return "\n".join(lines) + "\n"


def _figures(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())
