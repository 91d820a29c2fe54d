"""Pictures of heads beside the heatmap of a HeadMap: attention patterns as a grid, and how alike heads are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from polyhead.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

__all__ = ["attention_grid", "head_similarity", "similarity_map"]


def attention_grid(
    attention: torch.Tensor | np.ndarray,
    path: str | Path | None = None,
    *,
    tokens: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """One small picture of the attention weights for each head, layers downwards, heads across.

    Args:
        attention: ``[layers, heads, queries, keys]``: ``recording.attention[0]``.
        path: written there where given.
        tokens: names of the queries and keys, shown where there is one head or at most 12 tokens.
        title: above all.

    Raises:
        InputError: another shape, or as many names as there are not tokens.
    """
    weights = _array(attention)
    if weights.ndim != 4:
        raise InputError(f"An attention grid needs [layers, heads, queries, keys], got {list(weights.shape)}.")
    layers, heads, queries, keys = weights.shape
    if tokens is not None and len(tokens) != keys:
        raise InputError(f"{len(tokens)} tokens were named, the attention has {keys} keys.")
    one = layers * heads == 1
    size = 5.0 if one else float(np.clip(14 / max(layers, heads), 0.32, 2.2))
    figure = _figure(1.0 + heads * size, 0.8 + layers * size)
    grid = figure.subplots(layers, heads, squeeze=False)
    for layer in range(layers):
        for head in range(heads):
            axes = grid[layer][head]
            axes.imshow(weights[layer, head], cmap="viridis", vmin=0, aspect="auto", interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if layer == 0:
                axes.set_title(str(head), fontsize=7)
            if head == 0:
                axes.set_ylabel(str(layer), fontsize=7)
            if one and tokens is not None:
                axes.set_xticks(range(keys), tokens, rotation=90, fontsize=7)
                axes.set_yticks(range(queries), list(tokens)[-queries:], fontsize=7)
    figure.suptitle(title or "attention weights: layers downwards, heads across; rows are queries")
    return _done(figure, path)


def head_similarity(heads: torch.Tensor | np.ndarray) -> np.ndarray:
    """How alike heads are: linear CKA of their outputs over tokens, ``[layers * heads, layers * heads]`` in 0 to 1.

    Centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414): ``||Y'X||^2 / (||X'X|| ||Y'Y||)`` with columns
    centred; it does not change when a head's output is rotated or scaled.

    Args:
        heads: ``[batch, layers, heads, tokens, head_dim]``, ``recording.heads``; leave padded texts out.
    """
    given = _array(heads).astype(np.float64)
    if given.ndim != 5:
        raise InputError(f"Head similarity needs [batch, layers, heads, tokens, head_dim], got {list(given.shape)}.")
    _, layers, count, _, width = given.shape
    features = given.transpose(1, 2, 0, 3, 4).reshape(layers * count, -1, width)
    features = features - features.mean(1, keepdims=True)
    n = layers * count
    cross = np.empty((n, n))
    for row in range(n):
        products = np.matmul(features[row].T, features[row:])  # [rest, head_dim, head_dim]
        cross[row, row:] = cross[row:, row] = np.square(products).sum((1, 2))
    norm = np.sqrt(np.diag(cross))
    return cross / np.maximum(norm[:, None] * norm[None, :], np.finfo(float).tiny)


def similarity_map(
    similarity: np.ndarray, heads: int, path: str | Path | None = None, *, title: str = "linear CKA of head outputs"
) -> Figure:
    """Picture of :func:`head_similarity`, with a line between layers.

    Args:
        similarity: ``[n, n]``.
        heads: of a layer.
        path: written there where given.
        title: above it.
    """
    n = len(similarity)
    if similarity.shape != (n, n) or n % heads:
        raise InputError(f"A similarity map needs [n, n] with n a multiple of {heads} heads, got {similarity.shape}.")
    figure = _figure(7.5, 6.5)
    axes = figure.subplots()
    image = axes.imshow(similarity, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    for border in range(heads, n, heads):
        axes.axhline(border - 0.5, color="white", linewidth=0.6)
        axes.axvline(border - 0.5, color="white", linewidth=0.6)
    middles = np.arange(heads / 2 - 0.5, n, heads)
    every = max(1, len(middles) // 16)
    axes.set_xticks(middles[::every], [str(layer) for layer in range(0, len(middles), every)])
    axes.set_yticks(middles[::every], [str(layer) for layer in range(0, len(middles), every)])
    axes.set(xlabel="layer", ylabel="layer", title=title)
    figure.colorbar(image, ax=axes)
    figure.tight_layout()
    return _done(figure, path)


def _array(given: torch.Tensor | np.ndarray) -> np.ndarray:
    return given if isinstance(given, np.ndarray) else given.detach().float().cpu().numpy()


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Pictures need matplotlib: pip install 'polyhead[plot]'") from error
    return Figure(figsize=(width, height))


def _done(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=150, bbox_inches="tight")
    return figure
