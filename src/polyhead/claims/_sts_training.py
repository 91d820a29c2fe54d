"""What claims of training on graded sentence pairs share: training, and Spearman of any layer and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn

from polyhead.data import SentencePairs, load_sts
from polyhead.training import Options, Trainer, embed_layers, trainable

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["Vectors", "graded_pairs", "layer_vectors", "score", "trained"]

Vectors = dict[int, np.ndarray]
"""Layer -> ``[pairs, 2, dim]``."""


def graded_pairs(n: int, seed: int) -> SentencePairs:
    """Pairs of STS 2012 to 2014 to train on."""
    years = [load_sts(year) for year in (2012, 2013, 2014)]
    together = SentencePairs(
        "sts-2012-14",
        [pair for year in years for pair in year.pairs],
        np.concatenate([year.gold for year in years]),
        [name for year in years for name in year.group],
    )
    return together.sample(n, seed)


def trained(
    objective: nn.Module, data: SentencePairs, steps: int, seed: int, layers: int | None = None
) -> SentenceTransformer:
    """all-MiniLM-L6-v2, or its first layers, trained for some steps of 16 pairs."""
    from polyhead.training import shorten

    model = trainable("all-MiniLM-L6-v2", max_tokens=48)
    if layers is not None:
        model = shorten(model, layers)
    options = Options(batch_size=16, steps=steps, learning_rate=5e-5, seed=seed)
    return Trainer(objective, options=options).fit(model, data).model_


def layer_vectors(model: SentenceTransformer, data: SentencePairs, layers: Sequence[int]) -> Vectors:
    """What the model gives for each sentence after each of the layers."""
    texts = [text for pair in data.pairs for text in pair]
    order = np.argsort([len(text) for text in texts])
    parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    with torch.no_grad():
        for first in range(0, len(texts), 32):
            features = model.preprocess([texts[i] for i in order[first : first + 32]])
            features = {
                key: value.to(model.device) if hasattr(value, "to") else value for key, value in features.items()
            }
            for layer, found in embed_layers(model, features, layers).items():
                parts[layer].append(found)
    back = np.argsort(order)
    return {layer: torch.cat(found).cpu().numpy()[back].reshape(len(data), 2, -1) for layer, found in parts.items()}


def score(vectors: Vectors, gold: np.ndarray, sizes: Sequence[tuple[int, int]], rows: np.ndarray) -> float:
    """Mean Spearman correlation over sizes (layer, width) of cosines and grades, on some of the pairs."""
    found = []
    for layer, width in sizes:
        first, second = vectors[layer][rows, 0, :width], vectors[layer][rows, 1, :width]
        cosine = (first * second).sum(1) / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))
        found.append(float(spearmanr(cosine, gold[rows]).statistic))
    return float(np.mean(found))
