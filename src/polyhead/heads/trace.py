"""Who wrote what a head's attention rests on: edges from earlier heads into the few terms of one logit.

The terms that are needed for a logit (:mod:`polyhead.heads.attention_decomposition`) read the residual stream along one
direction on each side:

    logit_K = d~ . a   with   a = sum_{k in K} S_k (v_k . s~) u_k,   and likewise at the source

and the stream is a sum, so the reading divides exactly among the heads that wrote to it. Norms on the way are replaced
by their own factors in the pass, as in :mod:`polyhead.heads.residual`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from polyhead.errors import InputError, UnreadableModelError
from polyhead.heads._reading import read_layers
from polyhead.heads.attention_decomposition import LogitSVD, terms_needed
from polyhead.heads.residual import Block, TokenScale, blocks
from polyhead.heads.weights import read_weights
from polyhead.papers import paper
from polyhead.recording import blocks_of

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Edge", "Firing", "Trace", "graph", "upstream"]

Inputs = dict[str, torch.Tensor]
Side = Literal["destination", "source"]


class Firing(NamedTuple):
    """A head that attends from one token to another."""

    layer: int
    head: int
    destination: int
    source: int


class Edge(NamedTuple):
    """What an earlier head, at one token, adds to the kept terms of a logit.

    Attributes:
        writer: ``(layer, head)`` that wrote.
        reader: the firing whose logit it is added to.
        side: of the reader that was written to.
        position: the token where it was written: the reader's destination or source.
        weight: what it adds to the logit.
    """

    writer: tuple[int, int]
    reader: Firing
    side: Side
    position: int
    weight: float


@dataclass(frozen=True)
class Trace:
    """One firing, traced a step back.

    Attributes:
        firing: which.
        attention: the weight it fired with.
        logit: before masks, position biases and soft caps.
        terms: ``[dim]`` of the logit, in the singular basis.
        kept: which terms were needed, largest first.
        edges: from every earlier head on both sides, the largest weight first.
        rest: what the embedding, the feed-forward blocks and biases add on each side; with the edges of that side it
            makes up the kept terms.
        basis: per side ``[hidden, kept]`` directions that the kept terms read what attention is given along.
        readings: per side ``[kept]``, what they read, biases included.
    """

    firing: Firing
    attention: float
    logit: float
    terms: np.ndarray
    kept: tuple[int, ...]
    edges: tuple[Edge, ...]
    rest: dict[Side, dict[str, float]]
    basis: dict[Side, torch.Tensor] = field(repr=False)
    readings: dict[Side, torch.Tensor] = field(repr=False)

    def top(self, k: int = 5) -> tuple[Edge, ...]:
        """The ``k`` edges that add most."""
        return self.edges[:k]

    def signal(self, side: Side) -> torch.Tensor:
        """``[hidden]``: the least that must be taken from what attention is given for the kept terms to read 0."""
        basis = self.basis[side]
        return basis @ torch.linalg.pinv(basis.T @ basis) @ self.readings[side]


@dataclass
class _Pass:
    """What one pass of one row gave; ``scale`` is the norm before the traced layer's attention, where there is one."""

    blocks: list[Block] = field(default_factory=list)
    heads: dict[int, torch.Tensor] = field(default_factory=dict)
    scale: TokenScale | None = None


@paper("sparse-attention-decomposition")
def upstream(
    model: HeadedModel, inputs: Inputs, firing: Firing | tuple[int, int, int, int], share: float = 1.0
) -> Trace:
    """Trace a firing one step back: which earlier heads wrote the signals that its logit rests on.

    Args:
        model: any whose attention goes through transformers' interface and whose blocks are of the three known kinds.
        inputs: one row.
        firing: layer, head, destination and source token.
        share: of the logit that the kept terms, largest first, are to reach.

    Raises:
        InputError: more than one row, no such head or tokens, or a logit that is not positive.
        UnreadableModelError: a block or norm that is not known.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> trace = upstream(model, model.tokenize(["A man is playing a guitar."]), (3, 4, 2, 5))
        >>> {edge.side for edge in trace.edges} == {"destination", "source"}
        True
    """
    firing = Firing(*firing)
    _check(model, inputs, firing)
    weights = read_weights(model, fold=False, dtype=torch.float64)
    reading = next(read_layers(model, inputs, weights, layers=[firing.layer]))
    if max(firing.destination, firing.source) >= reading.tokens:
        raise InputError(f"{firing} was asked for; the input has {reading.tokens} tokens.")
    svd = LogitSVD.at(reading, 0, firing.head, firing.destination, firing.source)
    places: dict[Side, int] = {"destination": firing.destination, "source": firing.source}
    size = reading.size(0, firing.head, firing.destination, firing.source)
    d, s = (reading.x[0, places[side]] for side in ("destination", "source"))
    terms = svd.terms(d, s) * size
    needed = float(terms_needed(terms, share))
    if np.isnan(needed):
        raise InputError(
            f"The logit of {firing} is {float(terms.sum()):.3g}: no set of terms is needed for a logit "
            "that is not positive. Trace a pair that the head attends to for what it finds there."
        )
    kept = terms.argsort(descending=True)[: int(needed)]
    one = torch.ones(1, dtype=torch.float64, device=d.device)
    readings: dict[Side, torch.Tensor] = {
        "destination": torch.cat([d, one]) @ svd.left[:, kept],
        "source": torch.cat([s, one]) @ svd.right[:, kept],
    }
    basis: dict[Side, torch.Tensor] = {"destination": svd.left[:, kept], "source": svd.right[:, kept]}
    seen = _run(model, inputs, firing.layer)
    edges: list[Edge] = []
    rest: dict[Side, dict[str, float]] = {}
    other: dict[Side, Side] = {"destination": "source", "source": "destination"}
    for side in other:
        direction = basis[side] @ (svd.sizes[kept] * readings[other[side]]) * size
        constant = float(direction[-1])
        found, rest[side] = _divide(model, seen, firing.layer, direction[:-1], places[side])
        rest[side]["bias"] += constant
        edges += [Edge(writer, firing, side, places[side], weight) for writer, weight in found.items()]
    return Trace(
        firing=firing,
        attention=float(reading.attention[(0, *firing[1:])]),
        logit=float(terms.sum()),
        terms=terms.cpu().numpy(),
        kept=tuple(kept.tolist()),
        edges=tuple(sorted(edges, key=lambda edge: -edge.weight)),
        rest=rest,
        basis={side: matrix[:-1] for side, matrix in basis.items()},
        readings=readings,
    )


@paper("sparse-attention-decomposition")
def graph(
    model: HeadedModel,
    inputs: Inputs,
    firing: Firing | tuple[int, int, int, int],
    *,
    width: int = 2,
    depth: int = 3,
    share: float = 1.0,
) -> tuple[Edge, ...]:
    """Follow the ``width`` largest edges of each firing back, ``depth`` steps: a weighted graph of heads.

    A writer's own firing, in the next step, is the pair of its position and the token that it attends to most there;
    it ends where that pair's logit is not positive.
    """
    waiting, found, done = [(Firing(*firing), 0)], [], set()
    with model.record("attention") as recording, torch.no_grad():
        model(**inputs)
    while waiting:
        now, step = waiting.pop(0)
        if now in done or step == depth or now.layer == 0:
            continue
        done.add(now)
        try:
            edges = [edge for edge in upstream(model, inputs, now, share).top(width) if edge.weight > 0]
        except InputError:
            if step == 0:
                raise
            continue
        found += edges
        for edge in edges:
            layer, head = edge.writer
            source = int(recording.layer_attention(layer)[0, head, edge.position].argmax())
            waiting.append((Firing(layer, head, edge.position, source), step + 1))
    return tuple(found)


def _check(model: HeadedModel, inputs: Inputs, firing: Firing) -> None:
    rows = {len(value) for value in inputs.values()}
    if rows != {1}:
        raise InputError(f"upstream was given {max(rows)} rows, expected one: trace texts one by one.")
    inside = 0 <= firing.layer < model.layers and 0 <= firing.head < model.attention_layers[firing.layer].heads
    if not inside or min(firing.destination, firing.source) < 0:
        raise InputError(
            f"{firing} was asked for; '{model.name}' has {model.layers} layers x {model.heads} heads, and tokens count "
            "from 0."
        )


def _run(model: HeadedModel, inputs: Inputs, layer: int) -> _Pass:
    """One pass: the blocks, their heads, and the norm between a layer's stream and its attention."""
    seen, thread = _Pass(), threading.get_ident()
    around, attention = blocks_of(model)[layer], model.attention_layers[layer].module
    given: list[torch.Tensor] = []
    norms: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread and len(seen.blocks) == layer:
            given.append(args[0] if args else kwargs["hidden_states"])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if threading.get_ident() == thread and args and isinstance(output, torch.Tensor) and len(seen.blocks) == layer:
            norms.append((module, args[0], output))

    def keep(at: int, z: torch.Tensor) -> None:
        seen.heads[at] = z

    handles = [attention.register_forward_pre_hook(before, with_kwargs=True)]
    handles += [m.register_forward_hook(after) for m in around.modules() if not any(True for _ in m.children())]
    try:
        with torch.no_grad(), model.tap_heads(keep), blocks(model, seen.blocks.append):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    stream = seen.blocks[layer].x
    if not torch.equal(stream, given[0].to(stream.dtype)):
        norm = next(
            (n for n in norms if torch.equal(n[1].to(stream.dtype), stream) and torch.equal(n[2], given[0])), None
        )
        seen.scale = None if norm is None else TokenScale.of(*norm)
        if seen.scale is None:
            raise UnreadableModelError(
                f"What stands between the residual stream and the attention of layer {layer} in '{model.name}' is no "
                "norm that could be read."
            )
    return seen


def _back(scale: TokenScale, reads: torch.Tensor, place: int) -> torch.Tensor:
    """The direction before a norm that reads what ``reads`` reads after it: centring is its own transpose."""
    reads = scale.token[0, place].double() * scale.weight.double() * reads
    return reads - reads.mean() if scale.centers else reads


def _divide(
    model: HeadedModel, seen: _Pass, layer: int, direction: torch.Tensor, place: int
) -> tuple[dict[tuple[int, int], float], dict[str, float]]:
    """Divide what ``direction [hidden]`` reads of attention's input at a token among all that was written there."""
    rest = {"embedding": 0.0, "feedforward": 0.0, "bias": 0.0}
    found: dict[tuple[int, int], float] = {}
    reads = direction
    if seen.scale is not None:
        rest["bias"] += float(seen.scale.bias.double() @ reads)
        reads = _back(seen.scale, reads, place)
    for block in reversed(seen.blocks[:layer]):
        if block.out_norm is not None:
            rest["bias"] += float(block.out_norm.bias.double() @ reads)
            reads = _back(block.out_norm, reads, place)
        rest["feedforward"] += float(block.feedforward[0, place].double() @ reads)
        if block.mid_norm is not None:
            rest["bias"] += float(block.mid_norm.bias.double() @ reads)
            reads = _back(block.mid_norm, reads, place)
        inside = reads
        for step in reversed(block.branch):
            rest["bias"] += float(step.bias.double() @ inside)
            inside = _back(step, inside, place)
        bias = model.output_bias(block.layer)
        rest["bias"] += 0.0 if bias is None else float(bias.detach().double() @ inside)
        z = seen.heads[block.layer].reshape(-1, *seen.heads[block.layer].shape[-2:])[place].double()
        wrote = torch.einsum("hd,hdm,m->h", z, model.output_weight(block.layer).detach().double(), inside)
        found.update({(block.layer, head): float(weight) for head, weight in enumerate(wrote)})
    rest["embedding"] += float(seen.blocks[0].x[0, place].double() @ reads)
    return found, rest
