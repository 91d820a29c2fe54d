"""ReAGent names the tokens a generator's answer hangs on more faithfully than attention and gradients do."""

from __future__ import annotations

import numpy as np
import torch

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.data import load_texts
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.explain.base import Attribution, Attributor, NextTokenReadout
from polyhead.explain.baselines import AttentionRow, GradientNorm, LeaveOneOut, RandomScores
from polyhead.explain.faithfulness import soft_comprehensiveness
from polyhead.explain.reagent import ReAGent
from polyhead.explain.replacers import UnigramReplacer
from polyhead.heads.facts import CAPITALS

_KINDS = (
    "robin oak rose salmon piano hammer carrot apple dog ant copper poker chess tennis sofa truck wine cotton cobra"
)
_PLACES = "box drawer bag kitchen garden car basket garage cup bottle"
_THINGS = "key coin ring ball letter spoon book phone hat knife"


def run(scale: Scale, seed: int) -> Evidence:
    """Soft comprehensiveness of Gemma's token scores, and the rank of the word that is known to decide.

    Prompts of three kinds, each with its decisive word: a kind of thing ("A robin is a kind of"), a fact ("The capital
    of France is the city of") and a recall ("The key is in the box. The key is in the"). What is explained is the
    token that Gemma itself likes best. Strengths are ranks, so that every method perturbs the same amount.
    """
    full = scale == "full"
    readout = NextTokenReadout(loaded("gemma-3-270m", lm_head=True), batch_size=8)
    model = readout.model
    replacer = UnigramReplacer.from_texts(model, load_texts("ag-news", 400 if full else 50))
    methods: dict[str, Attributor] = {
        "reagent": ReAGent(replacer, max_steps=12 if full else 8, runs=3, seed=seed),
        "attention of the last layer": AttentionRow(),
        "gradient norm": GradientNorm(),
        "leave one out": LeaveOneOut(),
        "random": RandomScores(seed),
    }
    prompts = _prompts(seed)[: 15 if full else 4]
    comprehensive, ranks = _measured(readout, methods, prompts, seed)
    means = {name: float(np.mean(values)) for name, values in comprehensive.items()}
    others = [name for name in methods if name != "reagent"]
    rival = max((name for name in others if name != "leave one out"), key=lambda name: means[name])
    mine = np.array(comprehensive["reagent"])
    difference = bootstrap_interval(mine - np.array(comprehensive[rival]), seed=seed)
    from_one_out = bootstrap_interval(mine - np.array(comprehensive["leave one out"]), seed=seed)
    verdict = verdict_of(difference.low, difference.high)
    return Evidence(
        measured={
            "difference": difference.value,
            "soft comprehensiveness, reagent": means["reagent"],
            "rank of the decisive word, reagent": float(np.mean(ranks["reagent"])),
        },
        baseline={
            **{f"soft comprehensiveness, {name}": means[name] for name in others},
            **{f"rank of the decisive word, {name}": float(np.mean(ranks[name])) for name in others},
        },
        expected="soft comprehensiveness of ReAGent above attention, gradient norm and random, near leave-one-out",
        interval=(difference.low, difference.high),
        verdict=verdict if len(prompts) >= 10 else "inconclusive",
        decides="difference",
        data=f"{len(prompts)} prompts with a known decisive word",
        model=model.name,
        notes=f"The best of the other methods here is {rival}. Replacements are drawn by word frequency, as no "
        "mask-filling model is at hand; few steps and runs, where the paper takes up to thousands. Fewer than 10 "
        "prompts are inconclusive whatever the interval.",
        details={"reagent minus leave one out": [from_one_out.value, from_one_out.low, from_one_out.high]},
    )


def _measured(
    readout: NextTokenReadout, methods: dict[str, Attributor], prompts: list[tuple[str, str]], seed: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Soft comprehensiveness and rank of the decisive word for each method, prompt by prompt."""
    model = readout.model
    comprehensive: dict[str, list[float]] = {name: [] for name in methods}
    ranks: dict[str, list[float]] = {name: [] for name in methods}
    for text, decisive in prompts:
        ids = torch.tensor(model.tokenizer(text)["input_ids"], device=model.device)
        target = int(readout.probabilities(ids[None])[0].argmax())
        with torch.inference_mode():
            states = readout.embed(ids)
        for name, method in methods.items():
            found = method.text(readout, text, target)
            comprehensive[name].append(
                soft_comprehensiveness(readout.from_states, states, found.scores, scale="rank", samples=4, seed=seed)
            )
            ranks[name].append(_best_rank(found, text, decisive))
    return comprehensive, ranks


def _prompts(seed: int) -> list[tuple[str, str]]:
    """Texts and their decisive word, the three kinds in turn, in an order drawn by ``seed``."""
    generator = np.random.default_rng(seed)
    kinds = [(f"{_article(word)} {word} is a kind of", word) for word in _KINDS.split()]
    facts = [(f"The capital of {country} is the city of", country) for country in CAPITALS]
    recalls = [
        (f"The {thing} is in the {place}. Yes, the {thing} is in the", place)
        for thing, place in zip(_THINGS.split(), _PLACES.split(), strict=True)
    ]
    mixed = [[every[i] for i in generator.permutation(len(every))[:10]] for every in (kinds, facts, recalls)]
    return [prompt for three in zip(*mixed, strict=True) for prompt in three]


def _article(word: str) -> str:
    return "An" if word[0].lower() in "aeiou" else "A"


def _best_rank(found: Attribution, text: str, decisive: str) -> float:
    """Rank of the decisive word's best piece; its place is where the word stands first in the text."""
    start = text.index(decisive)
    at, ranks = 0, []
    for position, token in enumerate(found.tokens):
        if not found.judged[position]:
            continue
        if at < start + len(decisive) and at + len(token) > start:
            ranks.append(found.rank(position))
        at += len(token)
    return float(min(ranks))
