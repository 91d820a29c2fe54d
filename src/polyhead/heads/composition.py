"""How strongly heads read each other, from weights: composition of all pairs, and of each channel a head writes to.

A head writes ``x W_V W_O`` and a later head reads it through its query, key or value matrices. The composition of the
two is ``||W_V W_O R||_F / (||W_V W_O||_F ||R||_F)`` with ``R = W_Q W_K^T``, ``W_K W_Q^T`` or ``W_V W_O`` of the reader
(Elhage et al. 2021, as in TransformerLens). Neither product is ever formed: with ``W_V W_O = U S C`` (``C`` has a row a
channel) and ``R = X L Q`` (``Q`` orthonormal rows) it is ``||S C X L||_F``, a product of matrices ``head_dim``
wide that gives the score of every single channel by the way.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Progress, Score
from polyhead.heads.weights import LayerWeights, ModelWeights, read_weights
from polyhead.model import HeadedModel
from polyhead.papers import paper

__all__ = [
    "Channel",
    "Composition",
    "KComposition",
    "Link",
    "QComposition",
    "VComposition",
    "channels",
    "compose",
]

Kind = Literal["Q", "K", "V"]
Head = tuple[int, int]


class Link(NamedTuple):
    """One writer and one reader; ``channel`` is None where the whole of the writer is meant."""

    writer: Head
    channel: int | None
    reader: Head
    score: float


class Channel(NamedTuple):
    """What a head writes, split into rank-one pieces ``x -> size_i (x . reads_i) writes_i``, largest first.

    Attributes:
        reads: ``[channels, hidden]`` unit vectors of the residual stream.
        sizes: ``[channels]`` singular values.
        writes: ``[channels, hidden]`` unit vectors of the residual stream.
    """

    reads: torch.Tensor
    sizes: torch.Tensor
    writes: torch.Tensor


@dataclass(frozen=True)
class Composition:
    """Composition of every writer with every later reader.

    Attributes:
        kind: what the reader reads with: "Q", "K" or "V".
        values: ``[layers, heads, layers, heads]`` (writer, reader); NaN unless the writer stands in an earlier layer.
        by_channel: ``[layers, heads, channels, layers, heads]``, the same of each channel of the writer alone.
        sizes: ``[layers, heads, channels]`` singular values of the writers' ``W_V W_O``.
        chance: what two matrices without relation give: ``1 / sqrt(hidden)``, in root mean square.
        model: name.
        inexact: what the weights do not say exactly of the model.
    """

    kind: Kind
    values: np.ndarray
    by_channel: np.ndarray
    sizes: np.ndarray
    chance: float
    model: str
    inexact: str

    def top(self, k: int = 10, *, by_channel: bool = False) -> list[Link]:
        """The ``k`` strongest links; of whole heads, or of single channels."""
        values = self.by_channel if by_channel else self.values
        flat = np.where(np.isnan(values), -np.inf, values).ravel()
        best = [i for i in np.argsort(-flat, kind="stable")[:k] if np.isfinite(flat[i])]
        found = []
        for place in zip(*np.unravel_index(best, values.shape), strict=True):
            row = [int(i) for i in place]
            channel = row[2] if by_channel else None
            found.append(Link((row[0], row[1]), channel, (row[-2], row[-1]), float(values[place])))
        return found

    def map(self, side: Literal["reader", "writer"] = "reader") -> HeadMap:
        """The strongest link of each head as a reader (of all earlier heads) or as a writer (to all later ones)."""
        axes = (0, 1) if side == "reader" else (2, 3)
        known = np.isfinite(self.values)
        best = np.where(known, self.values, -np.inf).max(axis=axes)
        values = np.where(np.isfinite(best), best, np.nan)
        meaning = "reads one earlier head strongly" if side == "reader" else "is read strongly by one later head"
        return HeadMap(values, f"{self.kind.lower()}-composition", self.model, "", meaning)


@paper("talking-heads-channels")
def compose(model: HeadedModel | ModelWeights, kind: Kind = "K", *, dtype: torch.dtype = torch.float32) -> Composition:
    """Composition scores of all pairs of heads, and of each channel of each writer with each reader.

    Cost: ``2 hidden head_dim^2`` operations a pair, of the pairs with the writer in an earlier layer only.

    Args:
        model: a model, or weights that were read already (``read_weights(model, fold=False)`` for bare matrices).
        kind: the reader's side: "Q" (its queries read the writer), "K" (its keys) or "V" (its values).
        dtype: of the arithmetic.

    Raises:
        InputError: another kind.

    Example:
        >>> found = compose(load("gemma-3-270m"), "K")
        >>> found.top(1)[0].writer, found.top(1, by_channel=True)[0].channel
    """
    if kind not in ("Q", "K", "V"):
        raise InputError(f"Composition of kind {kind!r} was asked for, expected 'Q', 'K' or 'V'.")
    weights = model if isinstance(model, ModelWeights) else read_weights(model, dtype=dtype)
    layers, heads = len(weights.layers), max(len(layer.query) for layer in weights.layers)
    readers = [_readers(layer, kind) for layer in weights.layers]
    writers = [_writers(layer) for layer in weights.layers]
    width = max(len(sizes[0]) for sizes, _ in writers)
    by_channel = np.full((layers, heads, width, layers, heads), np.nan)
    values = np.full((layers, heads, layers, heads), np.nan)
    sizes = np.zeros((layers, heads, width))
    for at, (size, direction) in enumerate(writers):
        count, channels_here = size.shape
        sizes[at, :count, :channels_here] = size.double().cpu().numpy()
        power = size.square() / size.square().sum(1, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
        for later in range(at + 1, layers):
            read = readers[later]
            heard = (direction.flatten(0, 1) @ read).unflatten(-1, (len(weights.layers[later].query), -1))
            square = heard.square().sum(-1).unflatten(0, (count, channels_here))
            found = (square * power[..., None]).sum(1).clamp(min=0).sqrt()
            values[at, :count, later, : found.shape[1]] = found.double().cpu().numpy()
            by_channel[at, :count, :channels_here, later, : found.shape[1]] = square.sqrt().double().cpu().numpy()
    chance = weights.hidden**-0.5
    return Composition(kind, values, by_channel, sizes, chance, weights.model, weights.inexact)


def channels(weights: LayerWeights, head: int) -> Channel:
    """The rank-one pieces of what a head writes: ``W_V W_O = sum_i size_i reads_i^T writes_i``."""
    layer = weights.expanded()
    left, middle = torch.linalg.qr(layer.value[head].double())
    u, sizes, writes = torch.linalg.svd(middle @ layer.output[head].double(), full_matrices=False)
    kind = layer.value.dtype
    return Channel((left @ u).T.to(kind), sizes.to(kind), writes.to(kind))


def _writers(layer: LayerWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values ``[heads, dim]`` and right singular vectors ``[heads, dim, hidden]`` of ``W_V W_O``.

    Of ``R_V W_O`` with ``W_V = Q R_V``, by the Gram matrix in float64: ``dim`` wide instead of ``hidden``.
    """
    root = _triangle(layer.value).repeat_interleave(layer.groups, 0)
    wrote = root @ layer.output.double()
    power, basis = torch.linalg.eigh(wrote @ wrote.transpose(1, 2))
    power, basis = power.flip(-1).clamp(min=0), basis.flip(-1)
    sizes = power.sqrt()
    # Where nothing is written there is no direction; what rounding leaves is not blown up to unit length.
    kept = sizes > 1e-7 * sizes.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    scale = torch.where(kept, 1 / sizes.clamp(min=torch.finfo(torch.float64).tiny), torch.zeros_like(sizes))
    direction = (basis * scale[:, None, :]).transpose(1, 2) @ wrote
    kind = layer.output.dtype
    return (sizes * kept).to(kind), direction.to(kind)


def _readers(layer: LayerWeights, kind: Kind) -> torch.Tensor:
    """``[hidden, heads * dim]``: what a head reads with, in an orthonormal basis behind it, of Frobenius norm 1."""
    mine = layer.expanded()
    first, second = {
        "Q": (mine.query, mine.key.transpose(1, 2)),
        "K": (mine.key, mine.query.transpose(1, 2)),
        "V": (mine.value, mine.output),
    }[kind]
    read = first @ _triangle(second.transpose(1, 2)).transpose(1, 2).to(first.dtype)
    size = read.flatten(1).norm(dim=1).clamp(min=torch.finfo(read.dtype).tiny)
    return (read / size[:, None, None]).transpose(0, 1).flatten(1)


def _triangle(matrix: torch.Tensor) -> torch.Tensor:
    """``R`` of ``matrix = Q R`` in float64, ``[heads, dim, dim]`` of ``[heads, hidden, dim]``."""
    return torch.linalg.qr(matrix.double(), mode="r").R


@dataclass
class _CompositionScore(Score):
    """Shared by the three kinds.

    Args:
        side: "reader": how strongly a head reads one earlier head; "writer": how strongly one later head reads it.
    """

    needs: ClassVar[Any] = "weights"
    higher_means: ClassVar[str] = "reads one earlier head strongly"
    side: Literal["reader", "writer"] = "reader"

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """What the reader reads with."""

    def pairs(self, model: HeadedModel) -> Composition:
        """Every pair, instead of each head's strongest."""
        return compose(model, self.kind)

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; NaN in the first layer (the last, as writers). ``pairs`` gives all of it."""
        if self.side not in ("reader", "writer"):
            raise InputError(f"side is {self.side!r}, expected 'reader' or 'writer'.")
        return self.pairs(model).map(self.side)


class QComposition(_CompositionScore):
    """How strongly a head's queries read what one earlier head writes (Elhage et al. 2021)."""

    name: ClassVar[str] = "q-composition"
    summary: ClassVar[str] = "weights: how strongly a head's queries read one earlier head"
    kind: Kind = "Q"


class KComposition(_CompositionScore):
    """How strongly a head's keys read what one earlier head writes: induction heads do (Elhage et al. 2021)."""

    name: ClassVar[str] = "k-composition"
    summary: ClassVar[str] = "weights: how strongly a head's keys read one earlier head"
    kind: Kind = "K"


class VComposition(_CompositionScore):
    """How strongly a head's values read what one earlier head writes (Elhage et al. 2021)."""

    name: ClassVar[str] = "v-composition"
    summary: ClassVar[str] = "weights: how strongly a head's values read one earlier head"
    kind: Kind = "V"
