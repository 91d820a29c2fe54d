"""MoA: spans chosen a head from a profile recall more than one span for all heads, at equal density."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np
import torch

from polyhead.attention.moa_plan import SpanPlan, profile_attention_influence, search_plan
from polyhead.attention.moa_sparse import ElasticSpan, span_density
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.heads.needles import Needles

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

_SINKS = 4


def run(scale: Scale, seed: int) -> Evidence:
    """Gemma-3-270M: log-probability of needles under a plan less that under one span for all decides."""
    from polyhead.data import load_texts

    model = loaded("gemma-3-270m", lm_head=True)
    texts = load_texts("ag-news", 600)
    smoke = scale == "smoke"
    lengths, depths = ((96,), (0.2, 0.5, 0.8)) if smoke else ((160, 400), (0.1, 0.3, 0.5, 0.7, 0.9))
    first, second = (
        Needles.build(model.tokenizer, texts, lengths=lengths, depths=depths, each=each, seed=2 * seed + part)
        for part, each in ((0, 1), (1, 2 if smoke else 3))
    )
    candidates = [ElasticSpan(8), ElasticSpan(16), ElasticSpan(32), ElasticSpan(0, 0.25), ElasticSpan(0, 0.5)]
    profile = profile_attention_influence(model, first, [*candidates, ElasticSpan(0, 1)], sinks=_SINKS)
    found = {"whole": _scores(model, second, None)}
    densities: dict[str, float] = {}
    longest = max(profile.lengths)
    shares = (0.5,) if smoke else (0.5, 0.25)
    for share in shares:
        plan = search_plan(profile, share)
        drawn = np.random.default_rng(seed)
        flat = [span for row in plan.spans for span in row]
        kinds = {"plan": plan, "uniform": _uniform(model, longest, share)}
        for draw in range(1 if smoke else 3):
            order = drawn.permutation(len(flat)).reshape(model.layers, -1)
            kinds[f"random {draw}"] = SpanPlan(tuple(tuple(flat[at] for at in row) for row in order), _SINKS)
        for name, one in kinds.items():
            found[f"{name} at {share}"] = _scores(model, second, one)
            densities[f"{name} at {share}"] = one.density(longest)
    gap = (found["plan at 0.5"] - found["uniform at 0.5"])[:, 0]
    low, high = _bootstrap(gap, seed)
    return Evidence(
        measured={"difference": float(gap.mean())}
        | {f"recall {name}": float(each[:, 1].mean()) for name, each in found.items() if name.startswith("plan")},
        baseline={f"recall {name}": float(each[:, 1].mean()) for name, each in found.items() if name[:4] != "plan"},
        expected="at half the density, answers are likelier under the plan than under one span for all heads",
        interval=(low, high),
        verdict=verdict_of(low, high),
        decides="difference",
        data=f"planned on {first.name}; measured on {len(second)} others",
        model=model.name,
        notes="Nats a token of the answer; recall is the share of its tokens that would be said. Spans are chosen "
        "among six; the model's own sliding layers keep their window, which is longer than the prompts.",
        details={
            "nats a token": {name: float(each[:, 0].mean()) for name, each in found.items()},
            "density": densities,
            "predicted cost": {str(share): search_plan(profile, share).cost for share in shares},
        },
    )


def _uniform(model: HeadedModel, length: int, share: float) -> SpanPlan:
    """One span for all heads, the longest that keeps within the share."""
    spans = [ElasticSpan(start) for start in range(1, length + 1)]
    kept = span_density(spans, length, _SINKS)
    span = spans[int(np.flatnonzero(kept <= share)[-1])]
    return SpanPlan(tuple((span,) * layer.heads for layer in model.attention_layers), _SINKS)


@torch.no_grad()
def _scores(model: HeadedModel, needles: Needles, plan: SpanPlan | None) -> np.ndarray:
    """``[prompts, 2]``: mean log-probability of the answer's tokens, and the share of them that come first."""
    found = []
    with nullcontext() if plan is None else plan.on(model):
        for prompt in needles.prompts:
            ids = torch.tensor([[*prompt.prompt, *prompt.answer[:-1]]])
            logp = model(input_ids=ids, logits_to_keep=len(prompt.answer)).logits[0].log_softmax(-1)
            answer = torch.tensor(prompt.answer)
            said = (logp.argmax(-1) == answer).float().mean()
            found.append([logp.gather(1, answer[:, None]).mean().item(), said.item()])
    return np.array(found)


def _bootstrap(gap: np.ndarray, seed: int, resamples: int = 5_000) -> tuple[float, float]:
    random = np.random.default_rng(seed)
    low, high = np.quantile(gap[random.integers(0, len(gap), (resamples, len(gap)))].mean(1), (0.025, 0.975))
    return float(low), float(high)
