"""A route of information as a graph: nodes are token states, edges what flowed between them; JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from polyhead.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FlowEdge", "FlowGraph", "FlowNode"]

Stage = Literal["attention", "out"]
EdgeKind = Literal["residual", "head", "ffn", "bias"]
FORMAT_VERSION = 1
_HEAD_COLOURS = ("#1f77b4", "#2ca02c", "#d62728", "#9467bd", "#17becf", "#e377c2", "#8c564b", "#bcbd22")


class FlowNode(NamedTuple):
    """A token's state after a layer's attention ("attention") or after the layer ("out"); layer -1 is the input."""

    layer: int
    stage: Stage
    token: int

    @property
    def height(self) -> int:
        """Its place in the order of computation: 0 for the input, 2 more with each layer."""
        return 2 * self.layer + (2 if self.stage == "out" else 1)


class FlowEdge(NamedTuple):
    """What flows into ``target``: a share of it, and where from (None: a bias, from no token)."""

    source: FlowNode | None
    target: FlowNode
    kind: EdgeKind
    head: int | None
    importance: float


@dataclass(frozen=True)
class FlowGraph:
    """The route behind one state of one text, from the top down.

    Attributes:
        model: name. tokens: of the text, as strings.
        layers, heads: of the model.
        position: the token whose last state is explained. threshold: edges below it were left out.
        edges: from the top down. Before the threshold, the edges into a node sum to 1.
    """

    model: str
    tokens: tuple[str, ...]
    layers: int
    heads: int
    position: int
    threshold: float
    edges: tuple[FlowEdge, ...]

    @property
    def nodes(self) -> tuple[FlowNode, ...]:
        """Every state on the route, from the top down."""
        top = FlowNode(self.layers - 1, "out", self.position)
        found = {top} | {node for edge in self.edges for node in edge[:2] if node is not None}
        return tuple(sorted(found, key=lambda node: (-node.height, node.token)))

    def head_importance(self) -> np.ndarray:
        """``[layers, heads]``: the importance of each head's edges on the route, summed."""
        values = np.zeros((self.layers, self.heads))
        for edge in self.edges:
            if edge.head is not None:
                values[edge.target.layer, edge.head] += edge.importance
        return values

    def token_importance(self) -> np.ndarray:
        """``[tokens]``: how much of the explained state is reached from each input token along the route.

        The share of every path from the top to the input is the product of its edges, each renormalised over the kept
        edges of its target that come from a token; sums to 1 unless a route ends in a node without kept edges.
        """
        shares = {FlowNode(self.layers - 1, "out", self.position): 1.0}
        into: dict[FlowNode, list[FlowEdge]] = {}
        for edge in self.edges:
            if edge.source is not None:
                into.setdefault(edge.target, []).append(edge)
        values = np.zeros(len(self.tokens))
        for node in self.nodes:
            share = shares.get(node, 0.0)
            if node.layer < 0:
                values[node.token] += share
            total = sum(edge.importance for edge in into.get(node, []))
            for edge in into.get(node, []):
                assert edge.source is not None
                shares[edge.source] = shares.get(edge.source, 0.0) + share * edge.importance / total
        return values

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON text, written to ``path`` where one is given."""
        plain: dict[str, Any] = {"format": "polyhead.FlowGraph", "version": FORMAT_VERSION, "model": self.model}
        plain |= {"tokens": list(self.tokens), "layers": self.layers, "heads": self.heads}
        plain |= {"position": self.position, "threshold": self.threshold}
        plain["edges"] = [
            {
                "source": list(edge.source) if edge.source else None,
                "target": list(edge.target),
                "kind": edge.kind,
                "head": edge.head,
                "importance": edge.importance,
            }
            for edge in self.edges
        ]
        text = json.dumps(plain, ensure_ascii=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, text: str) -> FlowGraph:
        """Read what :meth:`to_json` gave.

        Raises:
            InputError: not a flow graph, or of a later format version.
        """
        try:
            plain = json.loads(text)
            known = plain["format"] == "polyhead.FlowGraph" and plain["version"] == FORMAT_VERSION
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"This is no FlowGraph: {error!r}; expected the text that FlowGraph.to_json gave."
            ) from error
        if not known:
            raise InputError(f"{plain['format']} version {plain['version']} was given; expected FlowGraph version 1.")
        edges = tuple(
            FlowEdge(
                FlowNode(*edge["source"]) if edge["source"] else None,
                FlowNode(*edge["target"]),
                edge["kind"],
                edge["head"],
                edge["importance"],
            )
            for edge in plain["edges"]
        )
        sizes = (plain["layers"], plain["heads"], plain["position"], plain["threshold"])
        return cls(plain["model"], tuple(plain["tokens"]), *sizes, edges)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Tokens along the bottom, layers upwards; grey is the residual stream, orange feed-forward, colours heads.

        A line is as thick as its edge is important. Heads are named where their edge is among the 12 most important.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError("FlowGraph.plot needs matplotlib: pip install 'polyhead[plot]'") from error
        width, height = max(4.0, 0.55 * len(self.tokens) + 1.2), max(3.0, 0.36 * self.layers + 1.4)
        figure = Figure(figsize=(min(width, 24), min(height, 24)))
        axes = figure.subplots()
        drawn = [edge for edge in self.edges if edge.source is not None]
        named = sorted((edge for edge in drawn if edge.kind == "head"), key=lambda edge: -edge.importance)[:12]
        for edge in drawn:
            _draw(axes, edge)
        for node in self.nodes:
            axes.plot(node.token, node.height, "o", color="#333333", markersize=3, zorder=3)
        _name_heads(axes, named)
        axes.set_xticks(range(len(self.tokens)), [_shown(token) for token in self.tokens], rotation=60, ha="right")
        step = max(1, self.layers // 12)
        shown = range(0, self.layers, step)
        axes.set_yticks([2 * layer + 2 for layer in shown], [str(layer) for layer in shown])
        axes.set(ylabel="layer", xlim=(-0.7, len(self.tokens) - 0.3), ylim=(-0.6, 2 * self.layers + 0.8))
        axes.set_title(f"{self.model}: route to token {self.position}, edges above {self.threshold:g}", fontsize=9)
        axes.tick_params(labelsize=8)
        figure.tight_layout()
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _shown(token: str) -> str:
    """A token as a label: the marks of sub-word vocabularies for a space made plain, dollars not read as formulas."""
    plain = token.replace("\u2581", "_").replace("\u0120", "_").replace("$", r"\$")
    return plain if len(plain) <= 12 else plain[:11] + "…"


def _draw(axes: Any, edge: FlowEdge) -> None:
    assert edge.source is not None
    colour = {"residual": "#9a9a9a", "ffn": "#f0a030"}.get(edge.kind, "")
    if edge.head is not None:
        colour = _HEAD_COLOURS[edge.head % len(_HEAD_COLOURS)]
    bend = 0.22 if edge.kind == "ffn" else 0.0
    xs = [edge.source.token, (edge.source.token + edge.target.token) / 2 + bend, edge.target.token]
    ys = [edge.source.height, (edge.source.height + edge.target.height) / 2, edge.target.height]
    axes.plot(xs, ys, "-", color=colour, linewidth=0.5 + 3.5 * edge.importance, alpha=0.85, zorder=2)


def _name_heads(axes: Any, edges: Sequence[FlowEdge]) -> None:
    """Names beside the edges, one a place: of several heads between two states the most important comes first."""
    places: dict[tuple[float, float], list[int]] = {}
    for edge in edges:
        assert edge.source is not None
        assert edge.head is not None
        middle = ((edge.source.token + edge.target.token) / 2, (edge.source.height + edge.target.height) / 2)
        places.setdefault(middle, []).append(edge.head)
    for (x, y), heads in places.items():
        label = "h" + ",".join(map(str, heads))
        style = {"fontsize": 6.5, "ha": "right", "va": "center", "zorder": 4}
        box = {"boxstyle": "round,pad=0.1", "color": "white", "alpha": 0.8}
        axes.annotate(label, (x, y), xytext=(-3, 0), textcoords="offset points", bbox=box, **style)
