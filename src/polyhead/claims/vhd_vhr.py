"""VHR, in text: reinforcing the heads that respond to a context makes a model follow the context."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from polyhead.act import Gate, Reinforce
from polyhead.act.base import Action
from polyhead.act.reinforce import responsive_heads
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.heads.context import ContextDivergence
from polyhead.heads.facts import ContextQuestion, answer_log_probs, context_questions


def run(scale: Scale, seed: int) -> Evidence:
    """Log-odds of the context's answer against the known one on Gemma, reinforced against random heads reinforced."""
    model = loaded("gemma-3-270m", lm_head=True)
    full = scale == "full"
    questions = context_questions(120 if full else 12, seed)
    others = context_questions(24 if full else 6, seed + 1)
    alphas = (1.25, 1.5, 2.0) if full else (1.5,)
    divergence = ContextDivergence().score(model, [(each.context, each.question) for each in others])
    counts = responsive_heads(torch.as_tensor(divergence.values)).sum(1).tolist()

    def reinforced(alpha: float) -> np.ndarray:
        def put(batch: Sequence[ContextQuestion], _: torch.Tensor) -> Action:
            with model.record("heads") as without, torch.inference_mode():
                model(**model.tokenize([each.question for each in batch]), logits_to_keep=1)
            return Reinforce(without, alpha)

        return _odds(answer_log_probs(model, questions, put))

    def at_random(alpha: float) -> np.ndarray:
        generator = np.random.default_rng(seed)
        gates = torch.ones(model.layers, model.heads)
        for layer, count in enumerate(counts):
            gates[layer, generator.choice(model.heads, count, replace=False)] = alpha
        return _odds(answer_log_probs(model, questions, lambda *_: Gate(gates)))

    plain = _odds(answer_log_probs(model, questions))
    found = {alpha: (reinforced(alpha), at_random(alpha)) for alpha in alphas}
    decides = 1.5
    interval = bootstrap_interval(found[decides][0] - found[decides][1], seed=seed)
    return Evidence(
        measured={
            "difference": interval.value,
            **{f"log-odds, reinforced by {alpha:g}": float(pair[0].mean()) for alpha, pair in found.items()},
        },
        baseline={
            "log-odds, plain": float(plain.mean()),
            **{f"log-odds, random heads by {alpha:g}": float(pair[1].mean()) for alpha, pair in found.items()},
        },
        expected="log-odds of the context's answer higher with responsive heads reinforced than with random heads",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high),
        decides="difference",
        data=f"{len(questions)} made-up contexts about capitals",
        model=model.name,
        notes="Text in place of images; nothing follows about CHAIR. Four heads a layer make the median coarse.",
        details={"most responsive heads": [list(at) for at in divergence.top(5)]},
    )


def _odds(log_probs: np.ndarray) -> np.ndarray:
    found: np.ndarray = log_probs[:, 0] - log_probs[:, 1]
    return found
