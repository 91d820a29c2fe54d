"""What one layer's queries and keys are made of in a pass: projections' inputs, rotations, sizes, attention."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from polyhead.errors import InputError
from polyhead.tap import AttentionCall, attention_weights

if TYPE_CHECKING:
    from polyhead.heads.weights import LayerWeights, ModelWeights
    from polyhead.model import HeadedModel

__all__ = ["LayerReading", "Turns", "read_layers"]


@dataclass(frozen=True)
class Turns:
    """Rotary positions as complex factors of pairs of features.

    Attributes:
        first, second: ``[pairs]`` features that are turned together.
        factors: ``[batch, tokens, pairs]``.
    """

    first: torch.Tensor
    second: torch.Tensor
    factors: torch.Tensor

    def between(self, row: int, destination: int, source: int, dim: int) -> torch.Tensor:
        """``R_i R_j^T``, ``[dim, dim]``: acts on queries from the right, and then keys needn't be turned."""
        factor = self.factors[row, destination] * self.factors[row, source].conj()
        turn = torch.eye(dim, dtype=torch.float64, device=factor.device)
        turn[self.first, self.first] = turn[self.second, self.second] = factor.real
        turn[self.first, self.second] = factor.imag
        turn[self.second, self.first] = -factor.imag
        return turn


@dataclass(frozen=True)
class LayerReading:
    """One layer of one pass.

    Attributes:
        layer: index.
        weights: the layer's, not folded, float64, a key matrix for each head.
        x: ``[batch, tokens, hidden]`` what the projections are given, float64.
        scaling: of the logits.
        query_size, key_size: ``[batch, heads, tokens]`` factors of queries and keys that a query-key norm (or a
            scaled projection) gives; 1 elsewhere.
        turns: rotary positions, or None where the model has none.
        attention: ``[batch, heads, tokens, tokens]``.
    """

    layer: int
    weights: LayerWeights
    x: torch.Tensor
    scaling: float
    query_size: torch.Tensor
    key_size: torch.Tensor
    turns: Turns | None
    attention: torch.Tensor

    @property
    def heads(self) -> int:
        """How many query heads."""
        return len(self.weights.query)

    @property
    def tokens(self) -> int:
        """Tokens of the longest row."""
        return self.x.shape[1]

    @cached_property
    def _bases(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """QR of the homogeneous matrices: basis ``[heads, hidden + 1, dim]`` and root ``[heads, dim, dim]`` of each."""
        w = self.weights
        query = torch.cat([w.query, w.query_bias[:, None]], 1)
        key = torch.cat([w.key, w.key_bias[:, None]], 1)
        (q, query_root), (k, key_root) = torch.linalg.qr(query), torch.linalg.qr(key)
        return q, query_root, k, key_root

    def _inner(self, row: int, head: int, destination: int, source: int) -> torch.Tensor:
        """``R_Q turn R_K^T``, ``[dim, dim]``: the query-key matrix in the bases of its two sides."""
        _, query_root, _, key_root = self._bases
        left = query_root[head]
        if self.turns is not None:
            left = left @ self.turns.between(row, destination, source, left.shape[-1])
        return self.scaling * left @ key_root[head].T

    def svd(
        self, row: int, head: int, destination: int, source: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``left [hidden + 1, dim], sizes [dim], right [hidden + 1, dim]`` of one pair's query-key matrix."""
        query, _, key, _ = self._bases
        u, sizes, v = torch.linalg.svd(self._inner(row, head, destination, source))
        return query[head] @ u, sizes, key[head] @ v.T

    def size(self, row: int, head: int, destination: int, source: int) -> float:
        """What the pair's logit is multiplied by beyond its query-key matrix: the frozen sizes."""
        return float(self.query_size[row, head, destination] * self.key_size[row, head, source])

    def factors(self, head: int, pairs: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """``d~ . u_k`` and ``S_k v_k . s~``, ``[pairs, dim]`` each, of pairs ``[pairs, 3]`` of row, query and key."""
        query, _, key, _ = self._bases
        rows, to, source = (torch.as_tensor(column, device=self.x.device) for column in pairs.T)
        left = self._read(query[head], rows, to) * self.query_size[rows, head, to, None]
        right = self._read(key[head], rows, source) * self.key_size[rows, head, source, None]
        if not len(pairs):
            return left, right
        if self.turns is None:
            u, sizes, v = torch.linalg.svd(self._inner(0, head, 0, 0))
            return left @ u, (right @ v.T) * sizes
        keys, which = np.unique(np.stack([pairs[:, 0], pairs[:, 1] - pairs[:, 2]], 1), axis=0, return_inverse=True)
        examples = [pairs[np.flatnonzero(which.ravel() == index)[0]] for index in range(len(keys))]
        inner = torch.stack([self._inner(int(r), head, int(i), int(j)) for r, i, j in examples])
        u, sizes, v = torch.linalg.svd(inner)
        at = torch.as_tensor(which.ravel(), device=self.x.device)
        return (left[:, None] @ u[at])[:, 0], (right[:, None] @ v[at].transpose(1, 2))[:, 0] * sizes[at]

    def _read(self, basis: torch.Tensor, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return self.x[rows, places] @ basis[:-1] + basis[-1]

    def logit(self, row: int, head: int, destination: int, source: int) -> float:
        """Before masks, position biases and soft caps."""
        left, right = self.factors(head, np.array([[row, destination, source]]))
        return float((left * right).sum())


def read_layers(
    model: HeadedModel,
    inputs: dict[str, torch.Tensor],
    weights: ModelWeights,
    layers: Sequence[int] | None = None,
) -> Iterator[LayerReading]:
    """Read one pass, one layer after the other: only one layer's attention is held by who lets go of the last.

    Args:
        model: any whose attention goes through transformers' interface.
        inputs: a batch.
        weights: of ``read_weights(model, fold=False, dtype=torch.float64)``.
        layers: which; None for all.

    Raises:
        InputError: queries or keys that are not their projections, scaled and rotated.
    """
    given: dict[int, torch.Tensor] = {}
    kept: dict[int, tuple[torch.Tensor, AttentionCall]] = {}
    thread = threading.get_ident()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            given[id(module)] = args[0] if args else kwargs["hidden_states"]

    def watch(layer: int, call: AttentionCall) -> None:
        kept[layer] = (given[id(call.module)], replace(call, output=call.output[:0]))

    chosen = range(model.layers) if layers is None else layers
    modules = {id(model.attention_layers[layer].module): model.attention_layers[layer].module for layer in chosen}
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules.values()]
    try:
        with torch.no_grad(), model.tap_attention(watch, layers=list(chosen)):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    for layer in chosen:
        yield _read(model, weights.layers[layer].expanded(), *kept.pop(layer))


def _read(model: HeadedModel, mine: LayerWeights, given: torch.Tensor, call: AttentionCall) -> LayerReading:
    with torch.no_grad():
        attention = attention_weights(call).double().nan_to_num(0.0)
    scaling = float(call.kwargs.get("scaling") or call.query.shape[-1] ** -0.5)
    # A padded token that sees nothing may be NaN.
    x, query, key = (tensor.detach().double().nan_to_num(0.0) for tensor in (given, call.query, call.key))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    projected = [
        torch.einsum("bti,hid->bhtd", x, w) + b[:, None]
        for w, b in ((mine.query, mine.query_bias), (mine.key, mine.key_bias))
    ]
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.05
    sizes = [_size(seen, made, tolerance) for seen, made in zip((query, key), projected, strict=True)]
    projected = [made * size[..., None] for made, size in zip(projected, sizes, strict=True)]
    turns = _turns(projected, [query, key], tolerance, model.name, mine.layer)
    return LayerReading(mine.layer, mine, x, scaling, sizes[0], sizes[1], turns, attention)


def _size(seen: torch.Tensor, made: torch.Tensor, tolerance: float) -> torch.Tensor:
    """How much longer each query or key is than its projection; rotation changes no length."""
    size = seen.norm(dim=-1) / made.norm(dim=-1).clamp(min=1e-30)
    return torch.ones_like(size) if bool(((size - 1).abs() < tolerance).all()) else size


def _turns(made: list[torch.Tensor], seen: list[torch.Tensor], tolerance: float, name: str, layer: int) -> Turns | None:
    """The rotation that takes projections to what attention saw: none, or one of pairs of features."""
    if all(_near(a, b, tolerance) for a, b in zip(made, seen, strict=True)):
        return None
    dim = made[0].shape[-1]
    whole, wanted = torch.cat(made, 1), torch.cat(seen, 1)  # queries and keys turn alike
    for turned in sorted({dim, dim // 2, dim // 4} - {0}, reverse=True):
        order = torch.arange(turned - turned % 2, device=whole.device)
        for first, second in (order.chunk(2), (order[::2], order[1::2])):
            a, b = (torch.complex(t[..., first], t[..., second]) for t in (whole, wanted))
            factors = (b * a.conj()).sum(1) / (a * a.conj()).real.sum(1).clamp(min=1e-30)
            guess, product = whole.clone(), a * factors[:, None]
            guess[..., first], guess[..., second] = product.real, product.imag
            if _near(guess, wanted, tolerance):
                return Turns(first, second, factors)
    raise InputError(
        f"Queries and keys of layer {layer} of '{name}' are not their projections, scaled and turned in pairs of "
        "features by position: their logits are no bilinear form of the residual stream that could be decomposed."
    )


def _near(found: torch.Tensor, seen: torch.Tensor, tolerance: float) -> bool:
    return bool((found - seen).abs().max() <= tolerance * seen.abs().max())
