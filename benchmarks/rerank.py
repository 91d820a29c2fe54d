"""What the service's ways to rerank are worth: nDCG@10 of the first 100 by one vector, ordered again, on cranfield.

Run: ``python benchmarks/rerank.py``; minutes. Writes ``benchmarks/results/rerank.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from polyhead.embed import Encoder
from polyhead.evaluate.datasets import load_retrieval
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.search.late import maxsim

RESULT = Path(__file__).parent / "results" / "rerank.json"
CANDIDATES = 100


def ndcg(gains: list[int], judged: list[int]) -> float:
    """nDCG@10 with the gains of the first ten and of all judged documents."""

    def discounted(values: list[int]) -> float:
        return float(sum(value / np.log2(rank + 2) for rank, value in enumerate(values[:10])))

    return discounted(gains) / discounted(sorted(judged, reverse=True))


def main() -> None:
    data, encoder = load_retrieval("cranfield"), Encoder(backend="torch")
    ids, texts, asked = list(data.corpus), list(data.corpus.values()), list(data.queries.values())
    documents, queries = encoder.encode_document(texts).dense, encoder.encode_query(asked).dense
    tokens, of_query = encoder.encode_tokens(texts), encoder.encode_tokens(asked, query=True)
    found: dict[str, list[float]] = {"dense": [], "late": [], "both": []}
    for number, name in enumerate(data.queries):
        dense = documents @ queries[number]  # unit vectors
        first = np.argsort(-dense, kind="stable")[:CANDIDATES]
        own = of_query.take(np.array([number])).vectors
        late = maxsim(own, tokens.take(first)) / len(own)
        judged = data.qrels[name]
        for way, scores in (("dense", dense[first]), ("late", late), ("both", (late + dense[first]) / 2)):
            order = first[np.argsort(-scores, kind="stable")]
            found[way].append(ndcg([judged.get(ids[i], 0) for i in order[:10]], list(judged.values())))
    rows = {}
    for way, values in found.items():
        whole = bootstrap_interval(np.array(values))
        less = bootstrap_interval(np.array(values) - np.array(found["dense"]))
        rows[way] = {
            "ndcg@10": whole.value,
            "interval": [whole.low, whole.high],
            "less dense": [less.value, less.low, less.high],
        }
    result = {"data": "cranfield", "model": encoder.name, "candidates": CANDIDATES, "queries": len(asked), "ways": rows}
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
