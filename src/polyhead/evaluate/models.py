"""Several models on one retrieval data set, each with the strategies asked for, in one table."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from polyhead import __version__
from polyhead.evaluate.datasets import RetrievalData, load_retrieval
from polyhead.evaluate.retrieval import evaluate_runs
from polyhead.evaluate.run import DEPTH, Progress, rank_all
from polyhead.search.strategies import Strategy, strategy

if TYPE_CHECKING:
    from polyhead.embed import Encoder
    from polyhead.evaluate.report import Report

__all__ = ["evaluate_models"]


def evaluate_models(
    data: str | RetrievalData,
    encoders: Mapping[str, Encoder],
    *,
    strategies: Sequence[str | Strategy] = ("dense",),
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Measure every strategy with every model; the first is tested against all others, Holm-corrected.

    Args:
        data: a name or folder, see :func:`polyhead.evaluate.datasets.load_retrieval`.
        encoders: by the name the report gives them. A row of the report is called "MODEL · STRATEGY", or MODEL where
            there is one strategy.
        strategies: to measure with each model.
        seed: of the statistics.
        progress: called with texts encoded and texts to encode, model after model.
    """
    found = load_retrieval(data) if isinstance(data, str) else data
    chosen = [strategy(one) for one in strategies]
    runs = {}
    for model, encoder in encoders.items():
        for name, run in rank_all(found, encoder, chosen, progress=progress).items():
            runs[model if len(chosen) == 1 else f"{model} · {name}"] = run
    meta = {
        "task": "retrieval",
        "models": {name: encoder.fingerprint for name, encoder in encoders.items()},
        "strategies": [one.name for one in chosen],
        "depth": DEPTH,
        "versions": {"polyhead": __version__, **{name: version(name) for name in ("transformers", "torch")}},
        "machine": platform.machine(),
    }
    return evaluate_runs(found, runs, seed=seed, meta=meta)
