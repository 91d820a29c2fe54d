"""Successor heads: some heads turn an ordered token into the next one, and models need them for sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.evaluate.statistics import bootstrap_interval, holm

if TYPE_CHECKING:
    from polyhead.heads.ordinal_features import Mod10Features
    from polyhead.model import HeadedModel


def run(scale: Scale, seed: int) -> Evidence:
    """Rise in loss on natural sequences with Gemma-3-270M's top successor head off, less that of random heads.

    Supported where that rise lies above random heads' and the head beats shuffled successors after Holm's correction
    over all heads; refuted where no head beats them or the rise is below. Smoke takes 12 sequences and 3 random heads,
    full all and 20.
    """
    from polyhead.act.gate import Gate
    from polyhead.heads.ordinal_features import Mod10Features
    from polyhead.heads.successor import SuccessorScore

    model = loaded("gemma-3-270m", lm_head=True)
    found = SuccessorScore().with_null(model, shuffles=2_000, seed=seed)
    adjusted = np.array(holm(found.p.ravel().tolist())).reshape(found.p.shape)
    (top,) = found.map.top(1)
    others = [head for head in np.ndindex(found.map.shape) if tuple(head) != top]
    chosen = np.random.default_rng(seed).permutation(len(others))[: 3 if scale == "smoke" else 20]
    texts = _sequences()[:: 4 if scale == "smoke" else 1]
    plain = _losses(model, texts)

    def rise(head: tuple[int, ...]) -> np.ndarray:
        with Gate.off([(head[0], head[1])], model).on(model):
            return _losses(model, texts) - plain

    features = Mod10Features(model)
    transfer = features.transfer(seed=seed)
    before, after = _steered(features, top)
    random = np.mean([rise(others[row]) for row in chosen], axis=0)
    mine = rise(top)
    interval = bootstrap_interval(mine - random, seed=seed)
    beats = bool(adjusted[top] < 0.05)
    return Evidence(
        measured={
            "succession of the top head": float(found.map.values[top]),
            "rise in loss": float(mine.mean()),
            "difference": interval.value,
            "heads beyond the null": float((adjusted < 0.05).sum()),
            "places told by other classes' features": transfer.share,
            "right successors after steering": after,
        },
        baseline={
            "succession of shuffled pairs": float(found.null[top]),
            "rise of random heads": float(random.mean()),
            "places of shuffled classes told": transfer.null,
            "the same successors before steering": before,
        },
        expected="a head beyond shuffled successors, whose ablation raises the loss on sequences more than others'",
        interval=(interval.low, interval.high),
        verdict=verdict_of(interval.low, interval.high) if beats else "refuted",
        decides="difference",
        data=f"{found.tokens} ordered tokens; {len(texts)} sequences such as 'Monday, Tuesday,'",
        model=model.name,
        notes="One model of 270M parameters; features modulo ten are differences of means in place of a sparse "
        "autoencoder's, and do not decide. Key-value heads are shared by 4 query heads, so heads of a layer differ in "
        "W_O alone.",
        details={
            "p of the features": transfer.p,
            "top heads": [[*head, float(found.map.values[head])] for head in found.map.top(5)],
        },
    )


def _steered(features: Mod10Features, head: tuple[int, int]) -> tuple[float, float]:
    """Share of words whose successor is that of the place they are steered to, before and after; all places."""
    if head[0] == 0:  # reads the embedding itself, which holds no such features
        return float("nan"), float("nan")
    found = [features.steer(head, minus=i, plus=j, scale=2.0) for i in range(10) for j in range(10) if i != j]
    words = np.array([each.words for each in found])
    shares = np.nan_to_num(np.array([[each.before, each.after] for each in found]))
    before, after = (shares * words[:, None]).sum(0) / words.sum()
    return float(before), float(after)


def _sequences() -> list[tuple[str, str]]:
    """Three words of a class in order, and the fourth."""
    from polyhead.heads._words import ORDINALS

    rows = []
    for words in ORDINALS.values():
        for start in range(len(words) - 3):
            rows.append((f"{words[start]}, {words[start + 1]}, {words[start + 2]},", f" {words[start + 3]}"))
    return rows


def _losses(model: HeadedModel, texts: list[tuple[str, str]]) -> np.ndarray:
    """Negative log-likelihood of the first token of what follows, ``[texts]``."""
    found = []
    for first in range(0, len(texts), 16):
        some = texts[first : first + 16]
        targets = [model.tokenizer(answer, add_special_tokens=False)["input_ids"][0] for _, answer in some]
        inputs = model.tokenize([prompt for prompt, _ in some])
        places = torch.arange(inputs["attention_mask"].shape[1])
        last = (inputs["attention_mask"].cpu() * places).argmax(1)
        with torch.inference_mode():
            logits = model(**inputs).logits[torch.arange(len(some)), last].float()
        found += (-torch.log_softmax(logits, -1)[torch.arange(len(some)), torch.tensor(targets)]).tolist()
    return np.array(found)
