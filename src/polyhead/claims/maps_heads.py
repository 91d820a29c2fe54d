"""MAPS: what weights say a head does to a word is what it does in prompts."""

from __future__ import annotations

import numpy as np

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.evaluate.statistics import bootstrap_of


def run(scale: Scale, seed: int) -> Evidence:
    """Pearson correlation over all heads of Gemma-3-270M of the static with the dynamic score, mean over relations.

    The paper has 6 models of up to 20B parameters and 20 relations. Here smoke takes 2 pairs of two relations, full up
    to 30 pairs of six. The interval is over heads. Heads are not zeroed.
    """
    from polyhead.heads._words import PROMPTS, RELATIONS
    from polyhead.heads.maps import Maps

    model = loaded("gemma-3-270m")
    names, most = (("copy", "following"), 2) if scale == "smoke" else (tuple(RELATIONS), 30)
    score, static, dynamic, found = Maps(), [], [], {}
    for name in names:
        rows = np.random.default_rng(seed).permutation(len(RELATIONS[name]))[:most]
        pairs = [RELATIONS[name][row] for row in rows]
        static.append(score.relation_score(model, pairs).promote.values.ravel())
        dynamic.append(score.dynamic_score(model, pairs, PROMPTS[name]).values.ravel())
        best = int(static[-1].argmax())
        found[name] = {
            "pearson": _pearson(static[-1], dynamic[-1]),
            "best head": [best // model.heads, best % model.heads],
            "static": float(static[-1][best]),
            "dynamic": float(dynamic[-1][best]),
        }

    def mean_correlation(rows: np.ndarray) -> float:
        return float(np.mean([_pearson(a[rows], b[rows]) for a, b in zip(static, dynamic, strict=True)]))

    interval = bootstrap_of(mean_correlation, model.layers * model.heads, seed=seed)
    return Evidence(
        measured={"pearson static and dynamic": interval.value},
        baseline={"no relation": 0.0},
        expected="positive: heads that map sources to targets by their weights do so at the end of prompts",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high),
        decides="pearson static and dynamic",
        data=f"{len(names)} relations ({', '.join(names)}) of up to {most} single-token pairs",
        model=model.name,
        notes="One model of 270M parameters; the causal part (zeroing the heads found) is not run. "
        "A relation in which a score is 0 for every head counts as correlation 0.",
        details=found,
    )


def _pearson(first: np.ndarray, second: np.ndarray) -> float:
    if first.std() == 0 or second.std() == 0:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])
