"""Soft injection: a task put into heads at the last token answers without examples in the prompt."""

from __future__ import annotations

import numpy as np
import torch

from polyhead.act import SoftInjection, shot_prompts, task_embedding
from polyhead.act.soft_injection import Settings, first_answer_token
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.heads.facts import CAPITALS


def run(scale: Scale, seed: int) -> Evidence:
    """Log-probability of capitals on Gemma: bare question, ten shots, all heads patched, and learned mixing weights."""
    model = loaded("gemma-3-270m", lm_head=True)
    full = scale == "full"
    countries = np.random.default_rng(seed).permutation(sorted(CAPITALS)).tolist()
    shown, train, test = countries[:8], countries[:12], countries[12:]
    shots = 5
    embedding = task_embedding(
        model, shot_prompts([(each, CAPITALS[each]) for each in shown], 20 if full else 4, shots, seed=seed)
    ).float()

    def asked(names: list[str]) -> list[tuple[str, str]]:
        return [(f"Q: {each}\nA:", f" {CAPITALS[each]}") for each in names]

    settings = Settings(steps=30 if full else 5, batch_size=6, check_every=1000, seed=seed)
    learned = SoftInjection.fit(model, embedding, asked(train), settings=settings)
    examples = "\n\n".join(f"Q: {each}\nA: {CAPITALS[each]}" for each in shown[:shots])
    with torch.inference_mode():
        bare = first_answer_token(model, asked(test))
        found = {
            "learned": first_answer_token(model, asked(test), learned),
            "all heads patched": first_answer_token(model, asked(test), SoftInjection(embedding, 1.0)),
            "even mix": first_answer_token(model, asked(test), SoftInjection(embedding, 0.5)),
            f"{shots} shots": first_answer_token(model, [(f"{examples}\n\n{q}", a) for q, a in asked(test)]),
        }
    interval = bootstrap_interval((found["learned"] - bare).double().numpy(), seed=seed)
    return Evidence(
        measured={"difference": interval.value, "log-probability, learned": float(found["learned"].mean())},
        baseline={
            "log-probability, bare question": float(bare.mean()),
            **{f"log-probability, {name}": float(each.mean()) for name, each in found.items() if name != "learned"},
        },
        expected="log-probability of the answer higher with learned mixing weights than for the bare question",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high),
        decides="difference",
        data=f"one task, capitals: {len(train)} to learn from, {len(test)} to test; {settings.steps} steps",
        model=model.name,
        notes="Log-probability of the answer's first token in place of accuracy over 57 tasks; a model of 270M.",
        details={"heads taken over most": [list(at) for at in learned.headmap().top(5)]},
    )
