"""Evidence as pages and feeds show it: figures side by side, a picture of the interval, and when it was found."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple

from polyhead.papers import cards

__all__ = ["Plot", "found_on", "plot_of", "said_of"]

WIDTH, LEFT, RIGHT = 600.0, 60.0, 540.0


class Plot(NamedTuple):
    """Where things stand in a picture 600 wide: horizontal places, and the numbers written there."""

    low: float
    high: float
    zero: float
    value: float | None
    said_low: str
    said_high: str
    said_value: str
    said: str


def plot_of(evidence: Mapping[str, Any]) -> Plot | None:
    """The interval with the figure that decides and zero; None where there is no interval to draw."""
    interval, name = evidence.get("interval"), evidence.get("decides") or ""
    if not interval or not all(map(_drawable, interval)):
        return None
    low, high = interval
    value = evidence.get("measured", {}).get(name)
    value = value if _drawable(value) else None
    shown = [low, high, 0.0, *([] if value is None else [value])]
    least, width = min(shown), (max(shown) - min(shown)) or 1.0

    def place(number: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (number - least) / width, 1)

    what = name or "the quantity that decides"
    said = f"{what}: 95% interval from {low:.3g} to {high:.3g}" + ("" if value is None else f", measured {value:.3g}")
    return Plot(
        place(low),
        place(high),
        place(0.0),
        None if value is None else place(value),
        f"{low:.3g}",
        f"{high:.3g}",
        "" if value is None else f"{value:.3g}",
        said,
    )


def said_of(evidence: Mapping[str, Any]) -> str:
    """The verdict and its figures in a sentence or two."""
    figures = ", ".join(f"{name} {_figure(value)}" for name, value in evidence.get("measured", {}).items())
    plot = plot_of(evidence)
    parts = [f"Expected: {evidence.get('expected', '')}", f"Measured: {figures}", plot.said if plot else ""]
    return ". ".join(part.rstrip(".") for part in parts if part) + "."


def found_on(id: str, evidence: Mapping[str, Any]) -> tuple[datetime, bool]:
    """When the evidence was found, and whether it says so itself; else when its file came to this installation."""
    date = str(evidence.get("date", ""))
    if re.match(r"\d{4}-\d\d-\d\d", date):
        found = datetime.fromisoformat(date)
        return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)), True
    changed = (cards.EVIDENCE / f"{id}.json").stat().st_mtime
    return datetime.fromtimestamp(int(changed), timezone.utc), False


def _drawable(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _figure(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)
