"""HeadMap, the currency of the house: analysis produces it, action spends it."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

__all__ = ["HeadMap"]

FORMAT_VERSION = 1


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Plots of a HeadMap need matplotlib: pip install 'polyhead[plot]'") from error
    return Figure(figsize=(width, height))


@dataclass(eq=False)
class HeadMap:
    """One number for each head of a model.

    Args:
        values: ``[layers, heads]``; NaN where a layer has no such head or a score is not defined.
        name: of the score.
        model: it was measured on.
        data: it was measured with, or empty where weights alone were used.
        higher_means: what a high value says of a head, in words.

    Example:
        >>> importance = HeadMap([[0.1, 0.9], [0.5, 0.3]], name="importance")
        >>> importance.top(2)
        [(0, 1), (1, 0)]
        >>> (importance * 2).mask(0.5).tolist()
        [[False, True], [True, False]]
    """

    values: np.ndarray
    name: str = "score"
    model: str = ""
    data: str = ""
    higher_means: str = "more"

    def __post_init__(self) -> None:
        self.values = np.array(self.values, dtype=np.float64)
        if self.values.ndim != 2:
            raise InputError(f"HeadMap values need the shape [layers, heads], got {list(self.values.shape)}.")

    @property
    def shape(self) -> tuple[int, int]:
        """``(layers, heads)``."""
        return self.values.shape[0], self.values.shape[1]

    def top(self, k: int | float) -> list[tuple[int, int]]:
        """The ``k`` heads of the highest values as ``(layer, head)``, best first; a float is a fraction of all heads.

        Ties go to the lower layer, then the lower head; NaN is never among them.

        Raises:
            InputError: a count that is negative or more than there are heads with a value, a fraction outside 0 to 1.
        """
        flat = self.values.ravel()
        known = int(np.isfinite(flat).sum())
        count = self._count(k, known)
        order = np.argsort(-np.where(np.isnan(flat), -np.inf, flat), kind="stable")[:count]
        return [(int(i) // self.shape[1], int(i) % self.shape[1]) for i in order]

    def _count(self, k: int | float, known: int) -> int:
        if isinstance(k, float):
            if not 0 <= k <= 1:
                raise InputError(
                    f"top({k}) was asked for; a fraction lies between 0 and 1. Give a whole number for a count."
                )
            return round(k * known)
        if not 0 <= k <= known:
            raise InputError(f"top({k}) was asked for; '{self.name}' has {known} heads with a value.")
        return int(k)

    def mask(self, k: int | float) -> np.ndarray:
        """Boolean ``[layers, heads]``, True for the heads of :meth:`top`."""
        chosen = np.zeros(self.shape, dtype=bool)
        for layer, head in self.top(k):
            chosen[layer, head] = True
        return chosen

    def overlap(self, other: HeadMap, k: int | float) -> float:
        """Share of the top ``k`` (a count, or a fraction) heads that are among the top ``k`` of the other map too.

        Raises:
            InputError: other shapes, or a ``k`` that chooses no head.
        """
        self._same_shape(other)
        first = set(self.top(k))
        if not first:
            raise InputError(f"The top {k} of '{self.name}' are no heads at all; ask for more.")
        return len(first & set(other.top(k))) / len(first)

    def in_words(self, k: int = 5) -> str:
        """The ``k`` highest heads in a sentence, with their values; fewer where fewer have one."""
        best = self.top(min(k, int(np.isfinite(self.values).sum())))
        if not best:
            return f"No head has a value of {self.name}."
        named = ", ".join(f"L{layer}H{head} ({self.values[layer, head]:.3g})" for layer, head in best)
        return f"Highest ({self.higher_means}): {named}."

    def rank_correlation(self, other: HeadMap) -> float:
        """Spearman correlation with another map of the same shape, over heads that have a value in both.

        Raises:
            InputError: other shapes, or fewer than 3 heads in common.
        """
        from scipy.stats import spearmanr

        self._same_shape(other)
        both = np.isfinite(self.values) & np.isfinite(other.values)
        if both.sum() < 3:
            raise InputError(
                f"'{self.name}' and '{other.name}' have values for {both.sum()} heads in common; 3 are needed."
            )
        return float(spearmanr(self.values[both], other.values[both]).statistic)

    def to_frame(self) -> pandas.DataFrame:
        """A pandas frame with columns layer, head and the score's name, one row a head."""
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("HeadMap.to_frame needs pandas: pip install 'polyhead[plot]'") from error
        layers, heads = self.shape
        columns = {"layer": np.repeat(np.arange(layers), heads), "head": np.tile(np.arange(heads), layers)}
        return pandas.DataFrame({**columns, self.name: self.values.ravel()})

    def save(self, path: str | Path) -> None:
        """Write as JSON; every digit is kept."""
        Path(path).write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN is None."""
        values = [[None if np.isnan(value) else value for value in row] for row in self.values.tolist()]
        plain = {"format": "polyhead.HeadMap", "version": FORMAT_VERSION, "name": self.name, "model": self.model}
        return {**plain, "data": self.data, "higher_means": self.higher_means, "values": values}

    @classmethod
    def load(cls, path: str | Path) -> HeadMap:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: not a HeadMap, or of a later format version.
        """
        try:
            plain = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"'{path}' cannot be read as a HeadMap: {error}") from error
        if not isinstance(plain, dict) or plain.get("format") != "polyhead.HeadMap":
            raise InputError(f"'{path}' is no HeadMap; expected a file written by HeadMap.save.")
        if plain.get("version") != FORMAT_VERSION:
            raise InputError(
                f"'{path}' has HeadMap format {plain.get('version')}, this Polyhead reads {FORMAT_VERSION}."
            )
        values = np.array([[np.nan if value is None else value for value in row] for row in plain["values"]])
        return cls(values, plain["name"], plain["model"], plain["data"], plain["higher_means"])

    def plot(self, path: str | Path | None = None) -> Figure:
        """A layers-by-heads heatmap, layer 0 at the bottom; written to ``path`` where one is given."""
        layers, heads = self.shape
        figure = _figure(1.5 + min(12, max(3, 0.32 * heads)), 1.2 + min(12, max(2, 0.32 * layers)))
        axes = figure.subplots()
        image = axes.imshow(self.values, origin="lower", aspect="auto", cmap="viridis")
        axes.set(xlabel="head", ylabel="layer", title=f"{self.name}\n{self.model} {self.data}".strip())
        axes.set_xticks(range(0, heads, max(1, heads // 16)))
        axes.set_yticks(range(0, layers, max(1, layers // 16)))
        figure.colorbar(image, ax=axes, label=f"high: {self.higher_means}")
        figure.tight_layout()
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def to_plotly(self) -> Any:
        """The heatmap as a ``plotly.graph_objects.Figure`` for web pages: each cell says its head and value."""
        try:
            from plotly import graph_objects
        except ImportError as error:
            raise MissingExtraError("HeadMap.to_plotly needs Plotly: pip install 'polyhead[plot]'") from error
        tip = "layer %{y}, head %{x}: %{z:.4g}<extra></extra>"
        cells = graph_objects.Heatmap(z=self.values.tolist(), colorscale="Viridis", hovertemplate=tip)
        figure = graph_objects.Figure(cells)
        figure.update_layout(title=f"{self.name} · {self.model}", xaxis_title="head", yaxis_title="layer")
        return figure

    def plot_against(self, other: HeadMap, path: str | Path | None = None) -> Figure:
        """A scatter plot of two maps, one point a head, coloured by layer; written to ``path`` where one is given."""
        self._same_shape(other)
        figure = _figure(6.0, 5.0)
        axes = figure.subplots()
        layer = np.repeat(np.arange(self.shape[0]), self.shape[1])
        points = axes.scatter(self.values.ravel(), other.values.ravel(), c=layer, cmap="viridis", s=18)
        rho = self.rank_correlation(other)
        axes.set(xlabel=self.name, ylabel=other.name, title=f"{self.model}\nSpearman rank correlation {rho:.3f}")
        figure.colorbar(points, ax=axes, label="layer")
        figure.tight_layout()
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _same_shape(self, other: HeadMap) -> None:
        if self.shape != other.shape:
            raise InputError(
                f"'{self.name}' has {self.shape[0]} layers x {self.shape[1]} heads, '{other.name}' has "
                f"{other.shape[0]} x {other.shape[1]}: maps of one model can be combined."
            )

    def _combined(self, other: Any, symbol: str, operation: Callable[[Any, Any], Any], swap: bool = False) -> HeadMap:
        value: Any
        if isinstance(other, HeadMap):
            self._same_shape(other)
            value, label = other.values, other.name
        elif isinstance(other, (int, float, np.number)):
            value, label = other, f"{other:g}"
        else:
            return NotImplemented
        left, right = (value, self.values) if swap else (self.values, value)
        words = f"({label} {symbol} {self.name})" if swap else f"({self.name} {symbol} {label})"
        return replace(self, values=operation(left, right), name=words)

    def __add__(self, other: Any) -> HeadMap:
        return self._combined(other, "+", operator.add)

    def __radd__(self, other: Any) -> HeadMap:
        return self._combined(other, "+", operator.add, swap=True)

    def __sub__(self, other: Any) -> HeadMap:
        return self._combined(other, "-", operator.sub)

    def __rsub__(self, other: Any) -> HeadMap:
        return self._combined(other, "-", operator.sub, swap=True)

    def __mul__(self, other: Any) -> HeadMap:
        return self._combined(other, "*", operator.mul)

    def __rmul__(self, other: Any) -> HeadMap:
        return self._combined(other, "*", operator.mul, swap=True)

    def __truediv__(self, other: Any) -> HeadMap:
        return self._combined(other, "/", operator.truediv)

    def __neg__(self) -> HeadMap:
        return replace(self, values=-self.values, name=f"-{self.name}", higher_means=f"less {self.higher_means}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HeadMap):
            return NotImplemented
        same = (self.name, self.model, self.data, self.higher_means) == (
            other.name,
            other.model,
            other.data,
            other.higher_means,
        )
        return same and self.shape == other.shape and bool(np.array_equal(self.values, other.values, equal_nan=True))
