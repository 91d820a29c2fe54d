"""TempScale: do longer texts lie closer together, and does sharper attention part them again?"""

from __future__ import annotations

import numpy as np
import torch

from polyhead.act import Temperature, length_report
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.data import load_sts, load_texts
from polyhead.evaluate.datasets import load_retrieval
from polyhead.evaluate.metrics import per_query
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.heads.tasks import PairSimilarity, run_task
from polyhead.model import HeadedModel


def run(scale: Scale, seed: int) -> Evidence:
    """Mean cosine between AG News pieces of two lengths at temperatures 1 and below, and quality on STS 2015.

    At full scale Cranfield too: 40 questions and 400 of its documents.
    """
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
    gains = [
        float(np.nanmean(row.gain.values)) for row in length_report(model, texts[: 16 if full else 4], (short, long))
    ]
    found = _cranfield(model, (1.0, 0.9), seed) if full else {}
    gain = bootstrap_interval(found[0.9] - found[1.0], seed=seed) if full else None
    both = min(collapse.low, parted.low), min(collapse.high, parted.high)
    return Evidence(
        measured={
            "smaller of both": min(collapse.value, parted.value),
            f"cosine rises from {short} to {long} tokens by": collapse.value,
            f"cosine at {long} tokens falls at tau={taus[-1]:g} by": parted.value,
            **{f"STS 2015 spearman, tau={tau:g}": quality[tau] for tau in taus[1:]},
            f"high-frequency gain at {long} tokens": gains[1],
            **({} if gain is None else {"Cranfield nDCG@10 at tau=0.9, change": gain.value}),
        },
        baseline={
            f"cosine at {short} tokens": float(cosine[1.0][short].mean()),
            f"cosine at {long} tokens": float(cosine[1.0][long].mean()),
            "STS 2015 spearman, tau=1": quality[1.0],
            f"high-frequency gain at {short} tokens": gains[0],
            **({} if gain is None else {"Cranfield nDCG@10 at tau=1": float(found[1.0].mean())}),
        },
        expected="at temperature 1 the mean cosine between texts rises with their length, and falls with a lower one",
        interval=both,
        verdict=verdict_of(*both),
        decides="smaller of both",
        data=f"{len(texts)} texts of joined AG News items; {len(task.data)} pairs of STS 2015",
        model=model.name,
        notes="A value a text is its mean cosine to the others. Cranfield runs at full scale alone: 40 questions, 400 "
        "documents cut to 128 tokens.",
        details={
            **{f"tau={tau:g}": {str(n): float(v.mean()) for n, v in rows.items()} for tau, rows in cosine.items()},
            "Cranfield interval": None if gain is None else [gain.low, gain.high],
        },
    )


def _cosines(model: HeadedModel, texts: list[str], length: int, tau: float) -> np.ndarray:
    """Each text's mean cosine to the others, cut to ``length`` tokens."""
    unit = _embedded(model, texts, length, tau)
    found: np.ndarray = ((unit @ unit.T).sum(1) - 1).numpy() / (len(texts) - 1)
    return found


def _embedded(model: HeadedModel, texts: list[str], length: int, tau: float) -> torch.Tensor:
    """Unit means over tokens, ``[texts, hidden]`` in float64."""
    pooled = []
    for first in range(0, len(texts), 8):
        inputs = model.tokenize(texts[first : first + 8], truncation=True, max_length=length)
        with Temperature(tau).on(model), torch.inference_mode():
            states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        pooled.append((states * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(pooled).double(), dim=-1)


def _cranfield(model: HeadedModel, taus: tuple[float, ...], seed: int) -> dict[float, np.ndarray]:
    """nDCG@10 of 40 questions at each temperature; their answers and others make 400 documents."""
    data = load_retrieval("cranfield")
    generator = np.random.default_rng(seed)
    asked = list(generator.permutation(list(data.queries))[:40])
    kept = {document for query in asked for document in data.qrels[query] if document in data.corpus}
    others = [document for document in data.corpus if document not in kept]
    documents = [*kept, *generator.permutation(others)[: max(0, 400 - len(kept))]]
    found = {}
    for tau in taus:
        held = _embedded(model, [data.corpus[each] for each in documents], 128, tau)
        scores = _embedded(model, [data.queries[each] for each in asked], 128, tau) @ held.T
        run = {
            query: [(documents[at], float(row[at])) for at in row.argsort(descending=True)[:100].tolist()]
            for query, row in zip(asked, scores, strict=True)
        }
        found[tau] = per_query(run, data.qrels, asked, ("ndcg@10",))["ndcg@10"]
    return found
