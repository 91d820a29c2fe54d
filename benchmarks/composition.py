"""All-pairs composition of heads: Polyhead against the product of every pair, and against TransformerLens where it is.

The model has GPT-2-small's shape (12 layers, 12 heads of 64, 768 features) and random weights: the arithmetic does not
depend on them. The pair product forms ``W_V W_O`` and ``W_Q W_K^T`` once a head, ``hidden x hidden``, then multiplies
pair by pair; a sample of the pairs is timed and scaled up to all. Polyhead's time includes each channel's score;
reading the weights is in neither. Run: ``python benchmarks/composition.py [--pairs N] [--rounds R]``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polyhead.heads.composition import compose
from polyhead.heads.weights import ModelWeights, read_weights
from polyhead.model import load

HERE = Path(__file__).parent


def pair_products(weights: ModelWeights, pairs: list[tuple[int, int, int, int]]) -> tuple[np.ndarray, float, float]:
    """Scores of some pairs by explicit products; seconds for all heads' matrices, and for the pairs."""
    started = time.perf_counter()
    write = [torch.matmul(layer.value, layer.output) for layer in weights.layers]
    read = [torch.matmul(layer.query, layer.key.transpose(1, 2)) for layer in weights.layers]
    write_size = [matrices.flatten(1).norm(dim=1) for matrices in write]
    read_size = [matrices.flatten(1).norm(dim=1) for matrices in read]
    heads = time.perf_counter() - started
    started = time.perf_counter()
    scores = [float((write[i][g] @ read[j][h]).norm() / (write_size[i][g] * read_size[j][h])) for i, g, j, h in pairs]
    return np.array(scores), heads, time.perf_counter() - started


def transformer_lens(weights: ModelWeights) -> tuple[np.ndarray, float] | None:
    """TransformerLens's own factored arithmetic on the same matrices, or None where it is not installed."""
    try:
        from transformer_lens import FactoredMatrix
        from transformer_lens.utilities.matrix import composition_scores
    except ImportError:
        return None
    wv, wo, wq, wk = (
        torch.stack([getattr(layer, role) for layer in weights.layers]) for role in ("value", "output", "query", "key")
    )
    started = time.perf_counter()
    scores = composition_scores(FactoredMatrix(wv, wo), FactoredMatrix(wq, wk.transpose(-2, -1)))
    return scores.numpy(), time.perf_counter() - started


def main() -> None:
    """Time, compare, write ``results/composition.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=600, help="pairs timed one by one, of 9,504")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    weights = read_weights(load(GPT2Model(GPT2Config()).eval()), fold=False)
    every = [(i, g, j, h) for i in range(12) for j in range(i + 1, 12) for g in range(12) for h in range(12)]
    chosen = [every[k] for k in np.random.default_rng(0).choice(len(every), options.pairs, replace=False)]
    ours, theirs, naive = [], [], []
    compose(weights, "Q")
    difference = 0.0
    for _ in range(options.rounds):
        started = time.perf_counter()
        found = compose(weights, "Q")
        ours.append(time.perf_counter() - started)
        scores, heads, pairs = pair_products(weights, chosen)
        naive.append(heads + pairs * len(every) / len(chosen))
        difference = max(difference, float(np.abs(scores - [found.values[pair] for pair in chosen]).max()))
        peer = transformer_lens(weights)
        if peer is not None:
            theirs.append(peer[1])
            known = np.isfinite(found.values)
            difference = max(difference, float(np.abs(peer[0][known] - found.values[known]).max()))
    result: dict[str, Any] = {
        "shape": "12 layers x 12 heads of 64, hidden 768, all 9,504 pairs of different layers, Q-composition",
        "polyhead_seconds": statistics.median(ours),
        "pair_products_seconds": statistics.median(naive),
        "ratio_to_pair_products": statistics.median(a / b for a, b in zip(ours, naive, strict=True)),
        "transformer_lens_seconds": statistics.median(theirs) if theirs else None,
        "ratio_to_transformer_lens": (
            statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) if theirs else None
        ),
        "largest_difference": difference,
        "pairs_timed_one_by_one": len(chosen),
        "rounds": options.rounds,
        "threads": options.threads,
        "machine": platform.processor() or platform.machine(),
        "torch": version("torch"),
        "transformer_lens": version("transformer_lens") if theirs else None,
    }
    (HERE / "results" / "composition.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
