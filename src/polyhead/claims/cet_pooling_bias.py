"""Pooling bias: a stronger retriever's hard negatives hurt where annotators saw a weaker one; coupling repairs it."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import torch
from torch import Tensor, nn

from polyhead.claims._metric_learning import Texts, cranfield, ndcg_at_10
from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.objectives import CoupledEstimator

_DEPTH = 10  # of BM25's pool, all that annotators are taken to have seen


def run(scale: Scale, seed: int) -> Evidence:
    """nDCG@10 by full judgements of a small reranker trained with MiniLM's hard negatives, with coupling less without.

    Labels are Cranfield's relevant documents within BM25's first 10. Negatives are other documents of MiniLM's first
    50 (hard), of BM25's first 50, or random. Half of the queries train, the other half judge, both ways round;
    MiniLM's first 50 are reranked.
    """
    torch.set_num_threads(1)
    data = cranfield(60, 400) if scale == "smoke" else cranfield(None, None)
    dense = data.queries @ data.documents.T
    lexical = _bm25(data)
    features = _features(data, dense, lexical)
    epochs = 30 if scale == "smoke" else 60
    arms = {"random": (None, False), "bm25": (lexical, False), "minilm": (dense, False), "coupled": (dense, True)}
    found: dict[str, np.ndarray] = {}
    rate = {}
    for name, (miner, coupled) in arms.items():
        scores = torch.full_like(dense, -1e9)
        for fold in (0, 1):
            held = torch.arange(len(dense)) % 2 == fold
            model, wrong = _train(data, features, lexical, ~held, miner, coupled, epochs, seed)
            rate[name] = wrong
            near = dense[held].topk(50, 1).indices
            some = torch.full_like(dense[held], -1e9)
            scores[held] = some.scatter(1, near, model.score(features[held]).gather(1, near))
        found[name] = ndcg_at_10(scores, data.grades)
    difference = bootstrap_interval(found["coupled"] - found["minilm"], seed=seed)
    loss = bootstrap_interval(found["minilm"] - found["bm25"], seed=seed)
    return Evidence(
        measured={"ndcg@10 coupled": float(found["coupled"].mean()), "difference": difference.value},
        baseline={f"ndcg@10 {name} negatives": float(found[name].mean()) for name in ("minilm", "bm25", "random")},
        expected="a higher nDCG@10 with coupling than without, on MiniLM's hard negatives",
        interval=(difference.low, difference.high),
        verdict=verdict_of(difference.low, difference.high),
        decides="difference",
        data=data.data,
        model="network of one hidden layer on 4 features of a pair",
        notes="A small network on features in place of a cross-encoder; where weights enter the losses is our reading.",
        details={
            "minilm less bm25 negatives": [loss.value, loss.low, loss.high],
            "share of negatives that are relevant": rate,
        },
    )


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _bm25(data: Texts) -> Tensor:
    """Scores ``[q, d]`` with k1 1.2 and b 0.75."""
    documents = [Counter(_words(text)) for text in data.document_texts]
    lengths = np.array([sum(words.values()) for words in documents])
    scores = np.zeros((len(data.query_texts), len(documents)), dtype=np.float32)
    for row, text in enumerate(data.query_texts):
        for word in set(_words(text)):
            times = np.array([words[word] for words in documents])
            within = int((times > 0).sum())
            rarity = math.log(1 + (len(documents) - within + 0.5) / (within + 0.5))
            scores[row] += rarity * times * 2.2 / (times + 1.2 * (0.25 + 0.75 * lengths / lengths.mean()))
    return torch.tensor(scores)


def _features(data: Texts, dense: Tensor, lexical: Tensor) -> Tensor:
    """``[q, d, 4]``: cosine, BM25, share of query words found, log length; each standardised."""
    words = [set(_words(text)) for text in data.document_texts]
    shared = [[len(q & d) / max(1, len(q)) for d in words] for q in (set(_words(t)) for t in data.query_texts)]
    length = torch.tensor([math.log(1 + len(own)) for own in words]).expand_as(dense)
    stacked = torch.stack((dense, lexical, torch.tensor(shared), length), -1)
    return (stacked - stacked.mean((0, 1))) / stacked.std((0, 1))


def _train(
    data: Texts,
    features: Tensor,
    lexical: Tensor,
    train: Tensor,
    miner: Tensor | None,
    coupled: bool,
    epochs: int,
    seed: int,
) -> tuple[CoupledEstimator, float]:
    """A reranker fitted on lists of one label and 15 negatives; and which share of the negatives is relevant."""
    pool = lexical.topk(_DEPTH, 1).indices
    labelled = torch.zeros_like(data.grades, dtype=torch.bool).scatter(1, pool, True) & (data.grades > 0)
    generator = torch.Generator().manual_seed(seed)
    lists = []
    for query, document in labelled.nonzero().tolist():
        if train[query]:
            among = torch.arange(len(data.documents)) if miner is None else miner[query].topk(50).indices
            among = among[~labelled[query, among]]
            drawn = among[torch.randperm(len(among), generator=generator)[:15]]
            lists.append((query, torch.cat((torch.tensor([document]), drawn))))
    queries = torch.tensor([query for query, _ in lists])[:, None]
    documents = torch.stack([row for _, row in lists])
    wrong = float((data.grades[queries, documents[:, 1:]] > 0).double().mean())
    torch.manual_seed(seed)
    relevance = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    # Selection sees what the pool was made by, and nothing else.
    selection = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1)) if coupled else None
    model = CoupledEstimator(relevance, selection, epochs=epochs, lr=1e-2, seed=seed)
    chosen = features[queries, documents]
    return model.fit(chosen, torch.zeros(len(lists), dtype=torch.long), chosen[..., 1:2]), wrong
