"""TempScale: do longer texts lie closer together, and does sharper attention part them again?"""

from __future__ import annotations

import numpy as np
import torch

from polyhead.act import Temperature
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.data import load_sts, load_texts
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.heads.tasks import PairSimilarity, run_task
from polyhead.model import HeadedModel


def run(scale: Scale, seed: int) -> Evidence:
    """Mean cosine between AG News pieces of two lengths, at temperatures 1 and below, and what it costs on STS 2015."""
    model = loaded("all-MiniLM-L6-v2")
    full = scale == "full"
    short, long = (64, 256) if full else (32, 128)
    generator = np.random.default_rng(seed)
    items = load_texts("ag-news", 4000 if full else 600)
    generator.shuffle(items)
    per_text = 12 if full else 6
    texts = [" ".join(items[i : i + per_text]) for i in range(0, per_text * (48 if full else 16), per_text)]
    taus = (1.0, 0.95, 0.9, 0.8) if full else (1.0, 0.8)
    cosine = {tau: {length: _cosines(model, texts, length, tau) for length in (short, long)} for tau in taus}
    collapse = bootstrap_interval(cosine[1.0][long] - cosine[1.0][short], seed=seed)
    # What the paper promises: the lowest temperature takes the long texts apart.
    parted = bootstrap_interval(cosine[1.0][long] - cosine[taus[-1]][long], seed=seed)
    task = PairSimilarity(load_sts(2015).sample(500 if full else 64, seed))
    rows = np.arange(len(task.data))
    quality = {}
    for tau in taus:
        with Temperature(tau).on(model):
            quality[tau] = task.quality(run_task(task, model), rows)
    both = min(collapse.low, parted.low), min(collapse.high, parted.high)
    return Evidence(
        measured={
            "smaller of both": min(collapse.value, parted.value),
            f"cosine rises from {short} to {long} tokens by": collapse.value,
            f"cosine at {long} tokens falls at tau={taus[-1]:g} by": parted.value,
            **{f"STS 2015 spearman, tau={tau:g}": quality[tau] for tau in taus[1:]},
        },
        baseline={
            f"cosine at {short} tokens": float(cosine[1.0][short].mean()),
            f"cosine at {long} tokens": float(cosine[1.0][long].mean()),
            "STS 2015 spearman, tau=1": quality[1.0],
        },
        expected="at temperature 1 the mean cosine between texts rises with their length, and falls with a lower one",
        interval=both,
        verdict=verdict_of(*both),
        decides="smaller of both",
        data=f"{len(texts)} texts of joined AG News items; {len(task.data)} pairs of STS 2015",
        model=model.name,
        notes="A value a text is its mean cosine to the others. Cranfield is left out for time.",
        details={f"tau={tau:g}": {str(n): float(v.mean()) for n, v in found.items()} for tau, found in cosine.items()},
    )


def _cosines(model: HeadedModel, texts: list[str], length: int, tau: float) -> np.ndarray:
    """Each text's mean cosine to the others, cut to ``length`` tokens."""
    pooled = []
    for first in range(0, len(texts), 8):
        inputs = model.tokenize(texts[first : first + 8], truncation=True, max_length=length)
        with Temperature(tau).on(model), torch.inference_mode():
            states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        pooled.append((states * mask).sum(1) / mask.sum(1))
    unit = torch.nn.functional.normalize(torch.cat(pooled).double(), dim=-1)
    found: np.ndarray = ((unit @ unit.T).sum(1) - 1).numpy() / (len(texts) - 1)
    return found
