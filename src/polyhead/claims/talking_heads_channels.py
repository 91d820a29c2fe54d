"""Talking Heads: one channel of a writer tells more of who talks to whom than its whole matrix does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.evaluate.statistics import bootstrap_of

if TYPE_CHECKING:
    from polyhead.heads.weights import ModelWeights
    from polyhead.model import HeadedModel


def run(scale: Scale, seed: int) -> Evidence:
    """Rank correlation of K-composition with what keys really receive: best single channel less whole matrix.

    What head B's keys really receive of head A is measured on texts, along the direct path: ``||z_A W_O W_K|| / (||z_A
    W_O|| ||W_K||)``, z_A the head's outputs at all tokens but the first. The paper's setting is GPT-2 and behaviours
    whose circuits are known; here it is all pairs of one model's heads, all-MiniLM-L6-v2 (smoke) or Gemma-3-270M.
    """
    from polyhead.data import load_texts
    from polyhead.heads.composition import compose
    from polyhead.heads.weights import read_weights

    model = loaded("all-MiniLM-L6-v2" if scale == "smoke" else "gemma-3-270m")
    texts = load_texts("ag-news", 8 if scale == "smoke" else 32)
    weights = read_weights(model)
    found = compose(weights, "K")
    real = _received(model, weights, texts)
    known = np.argwhere(np.isfinite(found.values))
    pairs = tuple(known.T)
    whole, single = found.values[pairs], np.nanmax(found.by_channel, axis=2)[pairs]
    measured = real[pairs]

    def difference(rows: np.ndarray) -> float:
        return _spearman(single[rows], measured[rows]) - _spearman(whole[rows], measured[rows])

    interval = bootstrap_of(difference, len(measured), seed=seed, resamples=300)
    best = found.top(3, by_channel=True)
    return Evidence(
        measured={"spearman best channel": _spearman(single, measured), "difference": interval.value},
        baseline={"spearman whole matrix": _spearman(whole, measured)},
        expected="the best single channel's score follows what keys receive more closely than the whole matrix's score",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high),
        decides="difference",
        data=f"ag-news, {len(texts)} texts, {len(measured)} pairs of heads",
        model=model.name,
        notes="The direct path only, along the frozen norms; no behaviour with a known circuit. "
        f"{weights.inexact}. Pairs share heads, so the interval is narrower than over models.",
        details={"strongest channels": [[*link.writer, link.channel, *link.reader, link.score] for link in best]},
    )


def _received(model: HeadedModel, weights: ModelWeights, texts: list[str]) -> np.ndarray:
    """``[layers, heads, layers, heads]`` what each reader's keys receive of each writer, over all texts."""
    layers, heads = len(weights.layers), model.heads
    second = torch.zeros(layers, heads, *(2 * [weights.layers[0].output.shape[1]]), dtype=torch.float64)
    for text in texts:
        with model.record("heads") as recording, torch.no_grad():
            model(**model.tokenize([text], truncation=True, max_length=64))
        z = recording.heads[0, :, :, 1:].double()  # the first token is a sink
        second += z.transpose(2, 3) @ z
    result = np.full((layers, heads, layers, heads), np.nan)
    keys = [layer.expanded().key.double() for layer in weights.layers]
    for at, layer in enumerate(weights.layers):
        wrote = layer.output.double()
        sent = torch.einsum("hde,hdi,hei->h", second[at], wrote, wrote)
        for later in range(at + 1, layers):
            heard = torch.einsum("hdi,gik->hgdk", wrote, keys[later])
            power = torch.einsum("hde,hgdk,hgek->hg", second[at], heard, heard)
            size = keys[later].flatten(1).square().sum(1)
            result[at, :, later] = (power / (sent[:, None] * size)).clamp(min=0).sqrt().numpy()
    return result


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)
