"""Evaluation: tasks with known answers, metrics an example, and statistics for every comparison."""

from __future__ import annotations

from typing import Any

__all__ = ["Measured", "Report", "as_mteb_model", "compare", "evaluate_retrieval", "evaluate_task"]

_HOMES = {
    "Measured": "measured",
    "Report": "report",
    "as_mteb_model": "mteb_model",
    "compare": "measured",
    "evaluate_retrieval": "run",
    "evaluate_task": "tasks",
}


def __getattr__(name: str) -> Any:
    # The rooms below use our statistics; what needs the rooms above them is loaded when it is asked for.
    if name not in _HOMES:
        raise AttributeError(f"module 'polyhead.evaluate' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"polyhead.evaluate.{_HOMES[name]}"), name)
