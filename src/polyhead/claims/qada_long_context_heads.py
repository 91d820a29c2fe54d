"""Query-adaptive locality: a Gaussian estimate tells, query by query, where the far tokens are not needed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.evaluate.statistics import bootstrap_of

if TYPE_CHECKING:
    from polyhead.heads.long_context import QueryAdaptiveLocality
    from polyhead.model import HeadedModel


def run(scale: Scale, seed: int) -> Evidence:
    """Gemma-3-270M's global layers: AUC for the true local label of each query, estimate less one label a head.

    The static label of a head is its share of local queries on other texts. The interval is a bootstrap over texts.
    """
    from polyhead.data import load_texts
    from polyhead.heads.long_context import QueryAdaptiveLocality

    model = loaded("gemma-3-270m", lm_head=True)
    count, tokens, window = (4, 400, 64) if scale == "smoke" else (12, 900, 128)
    items = load_texts("ag-news", 40 * 20)
    texts = ["\n".join(items[first : first + 40]) for first in range(0, 40 * (count + 3), 40)]
    score = QueryAdaptiveLocality(window=window, rows=32, max_tokens=tokens)
    known = score.measure(model, texts[count:])
    found = score.measure(model, texts[:count])
    globals_ = [layer.index for layer in model.attention_layers if layer.sliding_window is None]
    label = found.share("far")[:, globals_] >= score.tau
    adaptive = found.share()[:, globals_]
    fixed = np.broadcast_to((known.share("far")[:, globals_] >= score.tau).mean(0), label.shape)

    def gain(rows: np.ndarray) -> float:
        chosen = np.concatenate([np.flatnonzero(found.text == text) for text in rows])
        return _auc(adaptive[chosen], label[chosen]) - _auc(fixed[chosen], label[chosen])

    calibrated = replace(score, moments="calibrated").fit(model, texts[count:]).measure(model, texts[:count])
    interval = bootstrap_of(gain, count, resamples=500, seed=seed)
    error = np.abs(found.predicted - found.far)[:, globals_]
    kept, losses = _perplexity(model, score, texts[0], tokens)
    return Evidence(
        measured={
            "difference": interval.value,
            "AUC adaptive": _auc(adaptive, label),
            "AUC adaptive, calibrated moments": _auc(calibrated.share()[:, globals_], label),
            "median error of the log mass": float(np.median(error)),
            "nats a token, adaptive": losses["adaptive"],
            "local, adaptive": kept["adaptive"],
        },
        baseline={
            "AUC one label a head": _auc(fixed, label),
            "local in truth": float(label.mean()),
            "nats a token, whole attention": losses["whole"],
            "nats a token, oracle": losses["oracle"],
            "local, oracle": kept["oracle"],
        },
        expected="the estimate tells local queries better than one label a head does",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high),
        decides="difference",
        data=f"{count} texts of {tokens} tokens from ag-news, window {window}, {score.sinks} sinks, tau {score.tau}",
        model=model.name,
        notes="Short texts made of many news items, so that little that is far is needed; only the three global layers "
        "count. The verdict is on moments of the window's keys.",
    )


def _auc(values: np.ndarray, label: np.ndarray) -> float:
    """Area under the ROC curve by ranks, ties counted half."""
    from scipy.stats import rankdata

    ranks, label = rankdata(values.ravel()), label.ravel()
    positive = int(label.sum())
    negative = label.size - positive
    if not positive or not negative:
        return float("nan")
    return float((ranks[label].sum() - positive * (positive + 1) / 2) / (positive * negative))


def _perplexity(
    model: HeadedModel, score: QueryAdaptiveLocality, text: str, tokens: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Share of local queries in the global layers, and nats a token, of one text under each criterion."""
    import torch

    ids = torch.tensor([model.tokenizer(text)["input_ids"][:tokens]])
    kept: dict[str, float] = {}
    losses: dict[str, float] = {}
    for name in ("whole", "adaptive", "oracle"):
        with torch.inference_mode():
            if name == "whole":
                logits = model(input_ids=ids, use_cache=False).logits
            else:
                with score.on(model, oracle=name == "oracle") as shares:
                    logits = model(input_ids=ids, use_cache=False).logits
                windows = [layer.sliding_window for layer in model.attention_layers]
                kept[name] = float(np.mean([share for share, at in zip(shares, windows, strict=True) if at is None]))
            losses[name] = float(torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]))
    return kept, losses
