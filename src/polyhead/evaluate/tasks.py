"""One call for every task on vectors: data by name or file, one or several encoders, one report."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from polyhead import __version__
from polyhead.errors import InputError
from polyhead.evaluate.classification import measure_classification
from polyhead.evaluate.clustering import measure_clustering
from polyhead.evaluate.measured import Measured, compare
from polyhead.evaluate.pairs import measure_pairs
from polyhead.evaluate.report import Report
from polyhead.evaluate.reranking import measure_reranking
from polyhead.evaluate.sts import measure_sts
from polyhead.evaluate.task_data import load_labelled, load_pairs, load_reranking
from polyhead.evaluate.vectors import Encodes, Progress, name_of

__all__ = ["TASKS", "evaluate_task", "named"]


@dataclass(frozen=True)
class _Task:
    load: Callable[[str], Any]
    cut: Callable[[Any, int | None, int], Any]
    measure: Callable[..., dict[str, Measured]]


def _sampled(data: Any, limit: int | None, seed: int) -> Any:
    return data if limit is None else data.sample(limit, seed)


def _limited(data: Any, limit: int | None, seed: int) -> Any:
    return data.limited(limit, seed)


TASKS = {
    "sts": _Task(load_pairs, _sampled, measure_sts),
    "classification": _Task(load_labelled, _limited, measure_classification),
    "clustering": _Task(load_labelled, _limited, measure_clustering),
    "pairs": _Task(lambda name: load_pairs(name, labels=True), _sampled, measure_pairs),
    "reranking": _Task(load_reranking, _limited, measure_reranking),
}


def named(encoders: Mapping[str, Encodes] | Sequence[Encodes]) -> dict[str, Encodes]:
    """Encoders by the name a report gives them; those of one name are numbered.

    Raises:
        InputError: none.
    """
    if not encoders:
        raise InputError("There is no encoder to evaluate; give at least one.")
    if isinstance(encoders, Mapping):
        return dict(encoders)
    found: dict[str, Encodes] = {}
    for encoder in encoders:
        name, number = name_of(encoder), 2
        while name in found:
            name, number = f"{name_of(encoder)} ({number})", number + 1
        found[name] = encoder
    return found


def evaluate_task(
    task: str,
    data: Any,
    encoders: Mapping[str, Encodes] | Sequence[Encodes],
    *,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Measure encoders on a task; every one is tested against the first, all tests of the report Holm-corrected.

    Args:
        task: "sts", "classification", "clustering", "pairs" or "reranking".
        data: a name or file as :mod:`polyhead.evaluate.task_data` reads it, or data it made.
        encoders: by the name the report gives them, or a list; each a Polyhead encoder, a sentence-transformers model
            or a function of texts.
        limit: judge by at most so many pairs, texts or questions, drawn with ``seed``.
        seed: of ``limit``, bootstrap and permutations. The tasks' own draws keep mteb's seed.
        progress: called with texts encoded and texts to encode.
        options: of the task, such as ``probe="knn"``.

    Raises:
        InputError: an unknown task, no encoder, or data that does not fit.

    Example:
        >>> import numpy as np
        >>> from polyhead.data import SentencePairs
        >>> from polyhead.evaluate import evaluate_task
        >>> pairs = [("a", "a"), ("a", "ab"), ("ab", "abb"), ("a", "b")] * 5
        >>> data = SentencePairs("toy", pairs, np.array([5.0, 3.0, 4.0, 0.0] * 5), [""] * 20)
        >>> letters = lambda texts: np.array([[t.count("a"), t.count("b")] for t in texts], float)
        >>> lengths = lambda texts: np.array([[len(t), 1] for t in texts], float)
        >>> report = evaluate_task("sts", data, {"letters": letters, "lengths": lengths})
        >>> round(report.results["letters"]["spearman"].value, 2), report.comparisons[0].metric
        (1.0, 'spearman')
    """
    if task not in TASKS:
        raise InputError(f"No task '{task}': expected one of {', '.join(TASKS)}.")
    if limit is not None and limit < 2:
        raise InputError(f"limit = {limit}; expected at least 2.")
    kind = TASKS[task]
    found = kind.cut(kind.load(data) if isinstance(data, str) else data, limit, seed)
    chosen = named(encoders)
    measured = {name: kind.measure(found, one, progress=progress, **options) for name, one in chosen.items()}
    meta = {
        "task": task,
        "data": found.name,
        "card": getattr(found, "card", {}),
        "models": {name: str(getattr(one, "fingerprint", "")) for name, one in chosen.items()},
        "options": options,
        "limit": limit,
        "versions": {"polyhead": __version__, **{name: version(name) for name in ("transformers", "torch", "numpy")}},
        "machine": platform.machine(),
    }
    return compare(measured, seed=seed, meta=meta)
