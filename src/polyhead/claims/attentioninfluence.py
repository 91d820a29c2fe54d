"""AttentionInfluence: texts to be read from their own context lose more without retrieval heads than plain ones."""

from __future__ import annotations

import numpy as np

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.evaluate.statistics import bootstrap_of

_NAMES = ("Amber", "Basil", "Cedar", "Delta", "Ember", "Flint", "Grove", "Heron", "Ivory", "Jade", "Karst", "Linden")
_WORDS = ("lamp", "river", "stone", "candle", "garden", "window", "bridge", "mirror", "carpet", "bottle", "ladder")


def run(scale: Scale, seed: int) -> Evidence:
    """Gemma-3-270M with its top 5% retrieval heads attending evenly: rise of the loss on texts of several kinds.

    Decided by the AUC with which the rise tells texts that repeat what they said (key-value lists, passages said
    again, code) from unrelated sentences, less the mean AUC with as many random heads; the interval is over texts.
    Supported where that is above 0 and the AUC above 0.7. Smoke has 3 texts of a kind, 6 unrelated and one random draw,
    full 16, 32 and three.
    """
    from polyhead.data import load_texts
    from polyhead.heads.attention_influence import AttentionInfluence
    from polyhead.heads.needles import Needles
    from polyhead.heads.retrieval_heads import RetrievalHeads

    model = loaded("gemma-3-270m", lm_head=True)
    full = scale == "full"
    news = load_texts("ag-news", 600)
    depths = (0.1, 0.5, 0.9) if full else (0.2, 0.6)
    needles = Needles.build(model.tokenizer, news, lengths=(256,) if full else (96,), depths=depths, seed=seed)
    found = RetrievalHeads().score(model, needles)
    heads = found.top(0.05)
    random = np.random.default_rng(seed)
    others = [head for head in found.top(1.0) if head not in heads]
    draws = [
        [others[i] for i in random.choice(len(others), len(heads), replace=False)] for _ in range(3 if full else 1)
    ]
    texts, kinds = _texts(16 if full else 3, random)
    scorer = AttentionInfluence(max_tokens=64 if full else 32)
    whole = scorer.losses(model, texts)
    mine, *at_random = (scorer.of_texts(model, texts, each, whole=whole) for each in (heads, *draws))
    needs = np.array(kinds) != "unrelated sentences"

    def difference(rows: np.ndarray) -> float:
        own = _auc(mine[rows], needs[rows])
        return own - float(np.mean([_auc(values[rows], needs[rows]) for values in at_random]))

    interval = bootstrap_of(difference, len(texts), resamples=1000, seed=seed)
    verdict = verdict_of(interval.low, interval.high)
    auc = _auc(mine, needs)
    by_kind = {f"rise, {kind}": float(mine[np.array(kinds) == kind].mean()) for kind in dict.fromkeys(kinds)}
    kept = AttentionInfluence.select(mine, 0.25)
    return Evidence(
        measured={
            "difference": interval.value,
            "AUC": auc,
            **by_kind,
            "share of needing texts in the top quarter": float(needs[kept].mean()),
        },
        baseline={
            "AUC, random heads": float(np.mean([_auc(values, needs) for values in at_random])),
            "rise, random heads": float(np.mean(at_random)),
            "share of needing texts": float(needs.mean()),
        },
        expected="AUC above 0.7, and higher than with as many random heads",
        interval=(interval.low, interval.high),
        verdict="inconclusive" if verdict == "supported" and auc <= 0.7 else verdict,
        decides="difference",
        data=f"{len(texts)} texts of {scorer.max_tokens} tokens at most: synthetic, and sentences of STS",
        model=model.name,
        notes="Nothing is pretrained on the chosen texts, so the paper's gain is not tested. WordNet glosses are not "
        "here: sentences of STS stand for them. Repeated text has a low loss, so that any rise is large beside it; "
        "random heads share that.",
        details={"heads": [list(at) for at in heads]},
    )


def _auc(values: np.ndarray, positive: np.ndarray) -> float:
    """Share of pairs in which the positive one is higher, ties as half; 0.5 where there is one kind alone."""
    above = values[positive][:, None] - values[~positive]
    return float(((above > 0) + 0.5 * (above == 0)).mean()) if above.size else 0.5


def _texts(each: int, random: np.random.Generator) -> tuple[list[str], list[str]]:
    """Texts and their kinds: ``each`` of three kinds that need their context, and twice as many that do not."""
    from polyhead.data import load_texts

    sentences = load_texts("sts-2015")
    picked = iter(random.permutation(len(sentences)))

    def sentence() -> str:
        return sentences[next(picked)].strip().rstrip(".") + "."

    texts, kinds = [], []
    for _ in range(each):
        names, words = random.permutation(_NAMES)[:4], random.permutation(_WORDS)[:4]
        listed = " ".join(f"{name} has {word}." for name, word in zip(names, words, strict=True))
        again = " ".join(f"{names[i]} has {words[i]}." for i in random.permutation(4))
        once = sentence()
        code = "".join(f"{name.lower()} = '{word}'\n" for name, word in zip(names[:3], words[:3], strict=True))
        code += "".join(f"assert {names[i].lower()} == '{words[i]}'\n" for i in random.permutation(3))
        texts += [f"{listed} {again}", f"{once} {once}", code]
        kinds += ["key-value list", "said again", "code"]
        for _ in range(2):
            texts.append(f"{sentence()} {sentence()}")
            kinds.append("unrelated sentences")
    return texts, kinds
