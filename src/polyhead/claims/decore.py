"""DeCoRe: contrast with a copy without retrieval heads makes a model follow what it was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from polyhead.act import DeCoRe, Gate
from polyhead.act.vectors import last_logits
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.heads.facts import ContextQuestion, context_questions, first_token
from polyhead.model import HeadedModel

Heads = list[tuple[int, int]]
MASKED = 8


def run(scale: Scale, seed: int) -> Evidence:
    """Answers that Gemma writes to questions whose context names another city than the one it knows.

    The model's own ``generate`` with DeCoRe, the top retrieval heads masked (ranked by needles), beside greedy, a
    fixed weight of 1, and random heads of the same layers. Decided by the share of answers as the context gives them,
    with retrieval heads less with random ones; the interval is over questions. The first answer token's log-odds of
    given against known say the same more finely, and stand beside a contrast with the question without its context.
    """
    from polyhead.data import load_texts
    from polyhead.heads.needles import Needles
    from polyhead.heads.retrieval_heads import RetrievalHeads

    model = loaded("gemma-3-270m", lm_head=True)
    full = scale == "full"
    questions = context_questions(60 if full else 6, seed)
    depths = (0.1, 0.5, 0.9) if full else (0.5,)
    needles = Needles.build(model.tokenizer, load_texts("ag-news", 600), lengths=(96,), depths=depths, seed=seed)
    heads = RetrievalHeads().score(model, needles).top(MASKED)
    drawn = _same_layers(model, heads, np.random.default_rng(seed))
    ways: dict[str, DeCoRe | None] = {"DeCoRe": DeCoRe(heads), "random heads": DeCoRe(drawn)}
    if full:
        ways |= {"greedy": None, "fixed weight": DeCoRe(heads, 1.0)}
    right = {name: _answers(model, questions, way) for name, way in ways.items()}
    base = _scores(model, questions)
    alone = _scores(model, [replace(each, context="") for each in questions])
    contrast, masked = _compare(model, questions, base, heads)
    random_contrast, random_masked = _compare(model, questions, base, drawn)
    plain = base[:, 0] - base[:, 1]
    free = (1 + base[:, 2]) * plain - base[:, 2] * (alone[:, 0] - alone[:, 1])
    interval = bootstrap_interval(right["DeCoRe"] - right["random heads"], seed=seed)
    return Evidence(
        measured={
            "difference": interval.value,
            "right, DeCoRe": float(right["DeCoRe"].mean()),
            "log-odds, DeCoRe": float(contrast.mean()),
            "log-odds, retrieval heads masked": float(masked.mean()),
        },
        baseline={
            **{f"right, {name}": float(each.mean()) for name, each in right.items() if name != "DeCoRe"},
            "log-odds, greedy": float(plain.mean()),
            "log-odds, DeCoRe with random heads": float(random_contrast.mean()),
            "log-odds, random heads masked": float(random_masked.mean()),
            "log-odds, contrast without context": float(free.mean()),
        },
        expected="more answers follow the context with retrieval heads masked in the contrast than with random heads",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high),
        decides="difference",
        data=f"{len(questions)} made-up contexts about capitals; {MASKED} heads ranked on {len(needles)} needles",
        model=model.name,
        notes="A model of 270M that is not tuned to answer. Log-odds are scaled up by the contrast by construction "
        "wherever masking lowers them. Smoke leaves out greedy answers and those of a fixed weight, for time.",
        details={"masked heads": [list(at) for at in heads]},
    )


def _answers(model: HeadedModel, questions: Sequence[ContextQuestion], way: DeCoRe | None) -> np.ndarray:
    """Whether what is written begins with the answer that the context gives, ``[n]``."""
    found = []
    for each in questions:
        contrast = DeCoRe([], alpha=0.0) if way is None else way
        written = contrast.generate(model, each.context + each.question, max_new_tokens=3)
        found.append(float(written.strip().startswith(each.given.strip())))
    return np.array(found)


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
