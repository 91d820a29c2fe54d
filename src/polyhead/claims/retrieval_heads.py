"""Retrieval heads: few heads copy from far back, and without them the model loses the needle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.heads.needles import NeedlePrompt, Needles

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

_CONTINUED = 6


def run(scale: Scale, seed: int) -> Evidence:
    """Gemma-3-270M: what the answer loses without the top 5% of heads, less what it loses without random ones.

    Heads are scored on some prompts and switched off on others, at the steps that write the answer. The interval is
    a bootstrap over prompts and over draws of random heads at once.
    """
    from polyhead.data import load_texts
    from polyhead.heads.retrieval_heads import RetrievalHeads, needle_log_probability

    model = loaded("gemma-3-270m", lm_head=True)
    texts = load_texts("ag-news", 600)
    lengths = (96,) if scale == "smoke" else (256, 600)
    depths = (0.2, 0.5, 0.8) if scale == "smoke" else (0.1, 0.3, 0.5, 0.7, 0.9)
    draws = 10
    first, second = (
        Needles.build(model.tokenizer, texts, lengths=lengths, depths=depths, seed=2 * seed + part) for part in (0, 1)
    )
    result = RetrievalHeads().measure(model, first)
    scores = result.to_map()
    best = scores.top(0.05)
    others = [head for head in scores.top(1.0) if head not in best]
    random = np.random.default_rng(seed)
    drawn = [[others[i] for i in random.choice(len(others), len(best), replace=False)] for _ in range(draws)]
    logp = needle_log_probability(model, second, [[], best, *drawn])
    gap = (logp[2:] - logp[1]) / [len(prompt.answer) for prompt in second.prompts]
    low, high = _interval(gap, seed)
    drop = (logp[0] - logp[1:]) / [len(prompt.answer) for prompt in second.prompts]
    plain = needle_log_probability(model, _continuations(model, texts[: 2 * len(second)]), [[], best])
    alone = needle_log_probability(model, second, [[], *([head] for head in best)])
    return Evidence(
        measured={
            "difference": float(gap.mean()),
            "loss without the top 5%, nats a token": float(drop[0].mean()),
            "the same on ordinary text": float((plain[0] - plain[1]).mean() / _CONTINUED),
            "share of heads above 0.1": result.share_above(0.1),
        },
        baseline={"loss without random heads": float(drop[1:].mean()), "recall": float(result.recall.mean())},
        expected="the answer loses more log-probability without the top 5% retrieval heads than without as many random",
        interval=(low, high),
        verdict=verdict_of(low, high),
        decides="difference",
        data=f"{first.name}; heads off on {len(second)} others, {draws} random draws",
        model=model.name,
        notes="A 270M model on short texts; heads are off at the answer's steps only. The paper's other part, fewer "
        "than 5% of heads above 0.1, is among the figures and does not decide.",
        details={
            "top": [[layer, head, float(scores.values[layer, head])] for layer, head in scores.top(8)],
            "nats a token without each random draw": drop[1:].mean(1).tolist(),
            "nats without each of the top alone": (alone[0] - alone[1:]).mean(1).tolist(),
        },
    )


def _continuations(model: HeadedModel, texts: list[str]) -> Needles:
    """News items of which the last tokens are to be predicted, with nothing to copy: the control."""
    ids = [model.tokenizer(text)["input_ids"][:48] for text in texts]
    prompts = [NeedlePrompt(tuple(one[:-_CONTINUED]), tuple(one[-_CONTINUED:]), (0, 1)) for one in ids]
    return Needles(tuple(prompts), "news items")


def _interval(gap: np.ndarray, seed: int, resamples: int = 5_000) -> tuple[float, float]:
    """95% bootstrap interval of the mean of ``gap [draws, prompts]`` over both at once."""
    random = np.random.default_rng(seed)
    rows, columns = gap.shape
    means = [
        gap[np.ix_(random.integers(0, rows, rows), random.integers(0, columns, columns))].mean()
        for _ in range(resamples)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
