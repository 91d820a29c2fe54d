"""Multi-layer pooling: reading every layer beats the last for similarity and retrieval, not for classification."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from polyhead.claims._pooling import (
    MODEL,
    Pairs,
    Tokens,
    labelled,
    similarity,
    spearman,
    spearman_difference,
    sts_pairs,
    train_pairs,
    vectors,
)
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.pooling import MultiLayerPooler

_LAYERS, _DIM = 6, 384


def run(scale: Scale, seed: int) -> Evidence:
    """Spearman on STS 2015 of a pooler of all layers less the same pooler of the last layer alone.

    Both are trained alike, with InfoNCE on pairs of earlier years, on the means over tokens of a frozen model's layers.
    Besides: nearest-neighbour accuracy on Banking77. Decides: the difference in Spearman, by pairs.
    """
    torch.set_num_threads(1)
    smoke = scale == "smoke"
    data = _means(sts_pairs(200 if smoke else 1500, 250 if smoke else 1000, seed, layers=True))
    texts = labelled("banking77", 150 if smoke else 1000, 150 if smoke else 600, seed, layers=True)
    known, asked = _mean(texts.train), _mean(texts.test)
    found: dict[str, list[np.ndarray]] = {"all layers": [], "last layer": []}
    hits: dict[str, list[np.ndarray]] = {"all layers": [], "last layer": []}
    for one in range(seed, seed + (2 if smoke else 3)):
        for name, kept in (("all layers", slice(None)), ("last layer", slice(-1, None))):
            torch.manual_seed(one)
            count = _LAYERS if name == "all layers" else 0
            pooler = MultiLayerPooler(count, _DIM, latents=16, heads=8, hidden=_DIM)
            chosen = _only(data, kept)
            train_pairs(pooler, chosen, steps=40 if smoke else 400, seed=one, batch=16 if smoke else 32)
            found[name].append(similarity(pooler, chosen))
            near = vectors(pooler, _some(asked, kept)) @ vectors(pooler, _some(known, kept)).T
            hits[name].append((texts.train_labels[near.argmax(1)] == texts.test_labels).double().numpy())
    mean = [similarity(lambda x, mask: x[:, 0, -1], data)]
    gain = spearman_difference(found["all layers"], found["last layer"], data.gold, seed)
    classes = bootstrap_interval(np.mean(hits["all layers"], 0) - np.mean(hits["last layer"], 0), seed=seed)
    return Evidence(
        measured={
            "spearman all layers": spearman(found["all layers"], data.gold),
            "difference": gain.value,
            "accuracy difference": classes.value,
        },
        baseline={
            "spearman last layer": spearman(found["last layer"], data.gold),
            "spearman mean, not trained": spearman(mean, data.gold),
        },
        expected="a higher Spearman from all layers than from the last; accuracy of neighbours no different",
        interval=(gain.low, gain.high),
        verdict=verdict_of(gain.low, gain.high),
        decides="difference",
        data=data.data,
        model=f"{MODEL}, frozen",
        notes=(
            "A model that looks both ways, made for the mean of its last layer, frozen: the paper trains a language "
            "model with its pooling. Retrieval, clustering and the causal mask are not measured."
        ),
        details={
            "accuracy difference, 95%": [classes.low, classes.high],
            "accuracy of the nearest neighbour": {name: float(np.mean(each)) for name, each in hits.items()},
        },
    )


def _mean(tokens: Tokens) -> Tokens:
    """Each layer's mean over tokens, as texts of one token: what the pooler makes of them first."""
    weights = tokens.mask.float() / tokens.mask.sum(1, keepdim=True)
    states = torch.einsum("ntld,nt->nld", tokens.states, weights).unsqueeze(1)
    return Tokens(states, torch.ones(len(tokens), 1, dtype=torch.int64))


def _means(data: Pairs) -> Pairs:
    return Pairs(_mean(data.first), _mean(data.second), _mean(data.a), _mean(data.b), data.gold, data.data)


def _some(tokens: Tokens, kept: slice) -> Tokens:
    states: Tensor = tokens.states[:, :, kept]
    return Tokens(states, tokens.mask)


def _only(data: Pairs, kept: slice) -> Pairs:
    first, second, a, b = (_some(tokens, kept) for tokens in (data.first, data.second, data.a, data.b))
    return Pairs(first, second, a, b, data.gold, data.data)
