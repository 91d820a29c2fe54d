"""PAINT, in text: raising attention to a passage in the heads that look at it makes a model follow the passage."""

from __future__ import annotations

import numpy as np

from polyhead.act import AttentionBoost
from polyhead.act.vectors import Heads
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.heads.context import ContextAttention
from polyhead.heads.facts import answer_log_probs, context_questions


def run(scale: Scale, seed: int) -> Evidence:
    """Log-odds of the passage's answer on Gemma: boost in the 25% most sensitive heads, in random ones, in all."""
    model = loaded("gemma-3-270m", lm_head=True)
    full = scale == "full"
    strength = 0.5
    questions = context_questions(100 if full else 12, seed)
    others = context_questions(24 if full else 6, seed + 1)
    sensitive = ContextAttention().score(model, [(each.context, each.question) for each in others])
    count = round(0.25 * sensitive.values.size)
    every = [(layer, head) for layer in range(model.layers) for head in range(model.heads)]
    drawn = np.random.default_rng(seed).choice(len(every), count, replace=False)
    arms: dict[str, Heads] = {
        "sensitive heads": sensitive.top(count),
        "random heads": [every[i] for i in drawn],
        "all heads": None,
    }
    plain = answer_log_probs(model, questions)

    def boosted(heads: Heads) -> np.ndarray:
        return answer_log_probs(model, questions, lambda _, span: AttentionBoost([span], [strength], heads))

    found = {name: boosted(heads) for name, heads in arms.items()}
    odds = {name: each[:, 0] - each[:, 1] for name, each in {"plain": plain, **found}.items()}
    interval = bootstrap_interval(odds["sensitive heads"] - odds["random heads"], seed=seed)
    faithful = {f"faithful answers, {name}": float((each > 0).mean()) for name, each in odds.items()}
    return Evidence(
        measured={
            "difference": interval.value,
            "log-odds, sensitive heads": float(odds["sensitive heads"].mean()),
            "faithful answers, sensitive heads": faithful.pop("faithful answers, sensitive heads"),
        },
        baseline={
            **{f"log-odds, {name}": float(each.mean()) for name, each in odds.items() if name != "sensitive heads"},
            **faithful,
        },
        expected="log-odds of the passage's answer higher with sensitive heads boosted than with as many random heads",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high),
        decides="difference",
        data=f"{len(questions)} made-up contexts about capitals; strength {strength}, {count} heads",
        model=model.name,
        notes="Text in place of images; nothing follows about CHAIR. Perplexity on neutral text is not measured.",
    )
