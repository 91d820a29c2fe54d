"""Are Sixteen Heads Really Better than One: the least important fifth of the heads can go almost unnoticed."""

from __future__ import annotations

import numpy as np

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.data import SentencePairs, load_sts
from polyhead.headmap import HeadMap
from polyhead.heads.importance import AblationImportance, GradientImportance, GreedyImportance
from polyhead.heads.suffix import every_head
from polyhead.heads.tasks import PairSimilarity, run_task
from polyhead.model import HeadedModel

FRACTION = 0.2


def run(scale: Scale, seed: int) -> Evidence:
    """STS 2015 Spearman of all-MiniLM-L6-v2 without its 20% least important heads, less without 20% at random.

    Importance is measured on STS 2012 to 2014. The gradient score of the paper decides; full scale ranks by exact
    ablation and by greedy search as well, and names the best. Heads are masked, which gives what removing them gives.
    """

    model = loaded("all-MiniLM-L6-v2")
    full = scale == "full"
    maps = _maps(model, full, seed)
    count = round(FRACTION * len(every_head(model)))
    task = PairSimilarity(_by_length(load_sts(2015).sample(600 if full else 64, seed)))
    off = {f"{name}, least": (-found).top(count) for name, found in maps.items()}
    off["gradient, most"] = maps["gradient"].top(count)
    generator = np.random.default_rng(seed)
    heads = every_head(model)
    draws = [[heads[i] for i in generator.choice(len(heads), count, replace=False)] for _ in range(20 if full else 6)]
    predictions = {name: _without(model, task, chosen) for name, chosen in {"all heads": [], **off}.items()}
    at_random = [_without(model, task, chosen) for chosen in draws]
    rows = np.arange(len(task.data))
    quality = {name: task.quality(found, rows) for name, found in predictions.items()}
    random = float(np.mean([task.quality(found, rows) for found in at_random]))
    gains = {name: _interval(task, predictions[name], at_random, seed) for name in off}
    low, high = gains["gradient, least"]
    best = max((name for name in off if name.endswith("least")), key=lambda name: quality[name])
    return Evidence(
        measured={"difference": quality["gradient, least"] - random, **{f"spearman, {k}": quality[k] for k in off}},
        baseline={"spearman, all heads": quality["all heads"], "spearman, random heads off": random},
        expected="Spearman without the 20% least important heads (by gradient) above the mean of 20% at random",
        interval=(low, high),
        verdict=verdict_of(low, high),
        decides="difference",
        data=f"importance: STS 2012-2014; evaluation: {len(task.data)} pairs of STS 2015; {len(draws)} random draws",
        model=model.name,
        notes="A sentence encoder, not BERT on MNLI; the interval resamples pairs and draws. Few pairs at smoke scale.",
        details={
            "ranks best": best.removesuffix(", least"),
            "heads off": count,
            "interval of the difference to random": {name: list(found) for name, found in gains.items()},
            "rank correlation with exact ablation": {
                name: found.rank_correlation(maps["ablation"]) for name, found in maps.items() if "ablation" in maps
            },
        },
    )


def _maps(model: HeadedModel, full: bool, seed: int) -> dict[str, HeadMap]:
    def task(pairs_a_year: int) -> PairSimilarity:
        years = [load_sts(year).sample(pairs_a_year, seed) for year in (2012, 2013, 2014)]
        pairs = [pair for year in years for pair in year.pairs]
        gold = np.concatenate([year.gold for year in years])
        return PairSimilarity(SentencePairs("sts-2012 to 2014", pairs, gold, [g for year in years for g in year.group]))

    many = task(120 if full else 24)
    found = {
        "gradient": GradientImportance().score(model, many),
        "signed gradient": GradientImportance(signed=True).score(model, many),
    }
    found["gradient, normalised"] = _normalised(found["gradient"])
    if full:
        found["ablation"] = AblationImportance().score(model, task(40))
        found["mean ablation"] = AblationImportance("mean").score(model, task(40))
        found["greedy"] = GreedyImportance(heads_per_step=5, fraction=FRACTION).score(model, task(16))
    return found


def _normalised(raw: HeadMap) -> HeadMap:
    values = raw.values / np.sqrt((raw.values**2).sum(1, keepdims=True))
    return HeadMap(values, raw.name, raw.model, raw.data, raw.higher_means)


def _by_length(data: SentencePairs) -> SentencePairs:
    order = np.argsort([max(map(len, pair)) for pair in data.pairs], kind="stable")
    return SentencePairs(data.name, [data.pairs[i] for i in order], data.gold[order], [data.group[i] for i in order])


def _without(model: HeadedModel, task: PairSimilarity, heads: list[tuple[int, int]]) -> np.ndarray:
    from polyhead.act.gate import Gate

    with Gate.off(heads, model).on(model):
        return run_task(task, model)


def _interval(
    task: PairSimilarity, one: np.ndarray, draws: list[np.ndarray], seed: int, resamples: int = 400
) -> tuple[float, float]:
    """95% bootstrap interval of one quality less the mean of the draws', over pairs and draws."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        rows = generator.integers(0, len(one), len(one))
        chosen = generator.integers(0, len(draws), len(draws))
        each = {int(i): task.quality(draws[i], rows) for i in set(chosen.tolist())}
        found.append(task.quality(one, rows) - float(np.mean([each[int(i)] for i in chosen])))
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
