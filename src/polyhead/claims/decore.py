"""DeCoRe: contrast with a copy without retrieval heads makes a model follow what it was given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from polyhead.act import Gate
from polyhead.act.vectors import last_logits
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.heads.context import ContextAttention
from polyhead.heads.facts import ContextQuestion, context_questions, first_token
from polyhead.model import HeadedModel

Heads = list[tuple[int, int]]
MASKED = 8


def run(scale: Scale, seed: int) -> Evidence:
    """Log-odds of the context's answer on Gemma: DeCoRe with context heads masked, with random heads, and greedy."""
    model = loaded("gemma-3-270m", lm_head=True)
    full = scale == "full"
    questions = context_questions(120 if full else 12, seed)
    others = context_questions(24 if full else 6, seed + 1)
    heads = ContextAttention().score(model, [(each.context, each.question) for each in others]).top(MASKED)
    generator = np.random.default_rng(seed)
    draws = [_same_layers(model, heads, generator) for _ in range(3 if full else 1)]
    base = _scores(model, questions)
    found = _compare(model, questions, base, heads)
    random = [_compare(model, questions, base, drawn) for drawn in draws]
    greedy = base[:, 0] - base[:, 1]
    contrast, masked = found
    random_contrast, random_masked = (np.mean([each[i] for each in random], axis=0) for i in (0, 1))
    interval = bootstrap_interval(contrast - random_contrast, seed=seed)
    return Evidence(
        measured={
            "difference": interval.value,
            "log-odds, DeCoRe": float(contrast.mean()),
            "log-odds, context heads masked": float(masked.mean()),
        },
        baseline={
            "log-odds, greedy": float(greedy.mean()),
            "log-odds, DeCoRe with random heads": float(random_contrast.mean()),
            "log-odds, random heads masked": float(random_masked.mean()),
        },
        expected="log-odds of the context's answer higher by contrast with context heads masked than with random heads",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high),
        decides="difference",
        data=f"{len(questions)} made-up contexts about capitals; {MASKED} heads, {len(draws)} random draws",
        model=model.name,
        notes="Heads are ranked by attention on the context, a stand-in for retrieval scores. Log-odds of one "
        "answer token, which the contrast scales up by construction wherever masking lowers them; accuracy and "
        "generation are not judged.",
        details={"masked heads": [list(at) for at in heads]},
    )


def _same_layers(model: HeadedModel, heads: Heads, generator: np.random.Generator) -> Heads:
    """As many heads of each layer, at random."""
    counts = np.bincount([layer for layer, _ in heads], minlength=model.layers)
    return [
        (layer, int(head))
        for layer, count in enumerate(counts)
        for head in generator.choice(model.attention_layers[layer].heads, count, replace=False)
    ]


def _scores(model: HeadedModel, questions: Sequence[ContextQuestion], off: Heads | None = None) -> np.ndarray:
    """Log-probabilities of the given and the known answer and the entropy, ``[n, 3]``."""
    found = []
    for first in range(0, len(questions), 8):
        batch = questions[first : first + 8]
        inputs = model.tokenize([each.context + each.question for each in batch])
        with Gate.off(off or [], model).on(model), torch.inference_mode():
            log_p = torch.log_softmax(last_logits(model, inputs), -1).double()
        entropy = -(log_p.exp() * log_p).sum(-1)
        for row, each in enumerate(batch):
            given, known = first_token(model, each.given), first_token(model, each.known)
            found.append([float(log_p[row, given]), float(log_p[row, known]), float(entropy[row])])
    return np.array(found)


def _compare(
    model: HeadedModel, questions: Sequence[ContextQuestion], base: np.ndarray, heads: Heads
) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds by contrast, ``(1 + a) base - a masked`` with the base entropy as ``a``, and of the masked run alone."""
    other = _scores(model, questions, heads)
    plain, masked, alpha = base[:, 0] - base[:, 1], other[:, 0] - other[:, 1], base[:, 2]
    return (1 + alpha) * plain - alpha * masked, masked
