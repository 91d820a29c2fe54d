"""Key-value memories: values agree with what follows their keys' triggers, more in upper layers."""

from __future__ import annotations

import numpy as np

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.data import load_texts
from polyhead.evaluate.statistics import bootstrap_interval


def run(scale: Scale, seed: int) -> Evidence:
    """Agreement of Gemma-3-270M's values with the token after their keys' top trigger, and what removals do.

    Supported where agreement less that of shuffled values lies above zero over memories, and it rises with depth
    (Spearman over layers above zero); refuted where it lies below, or falls with depth. Smoke takes 48 texts and 48
    memories a layer, full 400 and 200. The median change of coefficients with the first or last token of the trigger
    gone is over 2 memories a layer (smoke), 20 (full).
    """
    from scipy.stats import spearmanr

    from polyhead.heads.memories import Memories

    count, each, longest, few = (48, 48, 32, 2) if scale == "smoke" else (400, 200, 48, 20)
    model = loaded("gemma-3-270m", lm_head=True)
    texts = load_texts("ag-news", count)
    memories = Memories(model, max_tokens=longest)
    found = memories.agreement_rate(texts, per_layer=each, seed=seed)
    gains = np.concatenate([hits - other for hits, other in zip(found.hits, found.shuffled, strict=True)])
    interval = bootstrap_interval(gains, seed=seed)
    trend = spearmanr(np.arange(model.layers), found.rates - found.shuffled_rates)
    slope = float(np.nan_to_num(trend.statistic))
    verdict = verdict_of(interval.low, interval.high)
    if verdict == "supported" and slope <= 0:
        verdict = "refuted"
    # Prefixes of one token have nothing left to compare; the median is not moved by coefficients near zero.
    chosen = [[trigger for trigger in layer if len(trigger.ids) > 3][:few] for layer in found.triggers]
    first, last = (
        np.array([np.median(memories.without(layer, which)) if layer else np.nan for layer in chosen])
        for which in ("first", "last")
    )
    depth = spearmanr(np.arange(model.layers), last, nan_policy="omit").statistic
    third = model.layers // 3
    return Evidence(
        measured={
            "agreement": float(found.rates.mean()),
            "agreement less shuffled": interval.value,
            "agreement in the upper third": float(found.rates[-third:].mean()),
            "spearman with depth": slope,
            "share of the vocabulary above the next token": float(np.concatenate(found.ranks).mean()),
            "change without the last token, lower third": float(np.nanmean(last[:third])),
            "change without the last token, upper third": float(np.nanmean(last[-third:])),
        },
        baseline={
            "agreement of shuffled values": float(found.shuffled_rates.mean()),
            "agreement in the lower third": float(found.rates[:third].mean()),
            "share above the next token of another memory": float(np.concatenate(found.shuffled_ranks).mean()),
            "change without the first token": float(np.nanmean(first)),
        },
        expected="agreement above shuffled values and rising with depth; leaving out the last token lowers "
        "coefficients more than the first, and most in lower layers",
        interval=(interval.low, interval.high),
        verdict=verdict,
        decides="agreement less shuffled",
        data=f"ag-news, {count} texts of at most {longest} tokens, {each} memories a layer",
        model=model.name,
        notes=f"Gated layers: the coefficient is gate times up. {few} memories a layer in the removals. Spearman with "
        f"depth has p = {float(np.nan_to_num(trend.pvalue, nan=1.0)):.2g} over {model.layers} layers.",
        details={
            "agreement by layer": found.rates.round(4).tolist(),
            "shuffled by layer": found.shuffled_rates.round(4).tolist(),
            "share above by layer": [round(float(layer.mean()), 4) for layer in found.ranks],
            "share above, shuffled, by layer": [round(float(layer.mean()), 4) for layer in found.shuffled_ranks],
            "change without first by layer": first.round(3).tolist(),
            "change without last by layer": last.round(3).tolist(),
            "spearman of the change without last with depth": float(depth),
        },
    )
