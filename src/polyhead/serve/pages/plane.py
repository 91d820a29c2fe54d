"""The documents of an index as points in a plane: the two directions in which their vectors differ most."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.errors import InputError
from polyhead.search.update import POSTED

if TYPE_CHECKING:
    from polyhead.search.view import View

__all__ = ["COLOURS", "Plane", "Point", "figure_of", "plane_of", "principal"]

COLOURS = ("kind", "folder")
MOST_ROWS = 4_000
MOST_GROUPS = 8
MOST_ATTRIBUTES = 12
MOST_LISTED = 300
REST = "all others"


@dataclass(frozen=True)
class Point:
    """A document.

    Attributes:
        x, y: coordinates.
        groups: what it can be coloured by -> its value in words.
    """

    title: str
    x: float
    y: float
    groups: dict[str, str]


@dataclass(frozen=True)
class Plane:
    """Documents as points.

    Attributes:
        points: in the order of the index.
        shares: of the variance that the two directions hold.
        rows, of_rows: how many chunks were looked at, and how many there are.
        attributes: names that points can be coloured by, the most common first.
    """

    points: list[Point]
    shares: tuple[float, float]
    rows: int
    of_rows: int
    attributes: tuple[str, ...]


def principal(vectors: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """The first two principal components ``[n, 2]`` of ``[n, dim]``, and the share of the variance of each.

    Signs are chosen so that the largest coordinate of each is positive: the picture is the same every time.
    """
    centred = np.asarray(vectors, dtype=np.float64) - np.mean(vectors, 0, dtype=np.float64)
    left, spread, _ = np.linalg.svd(centred, full_matrices=False)
    found = np.zeros((len(centred), 2))
    count = min(2, len(spread))
    found[:, :count] = left[:, :count] * spread[:count]
    found *= np.where(found[np.abs(found).argmax(0), [0, 1]] < 0, -1.0, 1.0)
    whole = float(np.square(spread).sum()) or 1.0
    shares = [float(one**2 / whole) for one in spread[:2]] + [0.0, 0.0]
    return found, (shares[0], shares[1])


def plane_of(view: View, *, most: int = MOST_ROWS, seed: int = 0) -> Plane:
    """The documents of a view, each at the mean of its chunks; of a large index a random sample of chunks.

    Raises:
        InputError: the view is empty.
    """
    if not view.n:
        raise InputError("The index is empty, so there are no documents to draw.")
    rows = np.arange(view.n)
    if view.n > most:
        rows = np.sort(np.random.default_rng(seed).permutation(view.n)[:most])
    records = view.fetch(rows)
    numbers: dict[str, int] = {}
    owner = np.array([numbers.setdefault(str(record["doc_id"]), len(numbers)) for record in records])
    sums = np.zeros((len(numbers), view.vectors(rows[:1], "dense").shape[1]))
    np.add.at(sums, owner, view.vectors(rows, "dense"))
    at, shares = principal(sums / np.bincount(owner)[:, None])
    first = np.unique(owner, return_index=True)[1]
    described = [_described(records[int(one)]) for one in first]
    points = [
        Point(title, float(x), float(y), groups) for (title, groups), (x, y) in zip(described, at.tolist(), strict=True)
    ]
    named = Counter(name for point in points for name in point.groups if name not in COLOURS)
    return Plane(points, shares, len(rows), view.n, tuple(name for name, _ in named.most_common(MOST_ATTRIBUTES)))


def figure_of(plane: Plane, colour: str) -> tuple[dict[str, Any], list[tuple[str, Point]]]:
    """A figure for ``plots.js``, and the points with their groups for the table, the largest group first.

    Raises:
        InputError: points cannot be coloured by that.
    """
    choices = (*COLOURS, *plane.attributes)
    if colour not in choices:
        raise InputError(f"Documents cannot be coloured by {colour!r}; choose one of {', '.join(choices)}.")
    values = [point.groups.get(colour, "none") for point in plane.points]
    largest = [name for name, _ in Counter(values).most_common(MOST_GROUPS)]
    groups: dict[str, list[Point]] = {name: [] for name in [*largest, REST]}
    for value, point in zip(values, plane.points, strict=True):
        groups[value if value in largest else REST].append(point)
    shown = {name: points for name, points in groups.items() if points}
    figure = {
        "kind": "scatter",
        "x": f"first direction ({plane.shares[0]:.0%} of the variance)",
        "y": f"second direction ({plane.shares[1]:.0%})",
        "groups": [
            {
                "name": _plain(name),
                "x": [round(point.x, 5) for point in points],
                "y": [round(point.y, 5) for point in points],
                "titles": [_plain(point.title) for point in points],
            }
            for name, points in shown.items()
        ],
    }
    rows = [(name, point) for name, points in shown.items() for point in points]
    return figure, rows[:MOST_LISTED]


def _described(record: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """Title and groups of a document, from one of its rows."""
    path = str(record["path"]).removeprefix(POSTED)
    folder = str(PurePosixPath(path).parent)
    attributes = json.loads(record["attributes"]) if record["attributes"] else {}
    given = {str(name): str(value) for name, value in attributes.items() if value is not None}
    groups = {**given, "kind": str(record["kind"]), "folder": "(top)" if folder == "." else folder}
    return record["title"] or path, groups


def _plain(text: str) -> str:
    """Plotly reads a little HTML in names; these are texts."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
