"""Late interaction on mrag-wikipedia: what MUVERA's candidates keep of the exact top 10, and each stage's time.

Run: python benchmarks/late.py   (writes benchmarks/results/late.json; token vectors are made once and kept below
POLYHEAD_HOME, which takes minutes on a CPU)
"""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path

import numpy as np
import torch

from polyhead.embed import Encoder, TokenVectors
from polyhead.evaluate.datasets import load_retrieval
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.paths import home
from polyhead.search.late import FDEEncoder, MuveraIndex, maxsim

RESULTS = Path(__file__).parent / "results" / "late.json"
COUNTS = (20, 50, 100, 200)
# Every fifth question is encoded. Of those, every fourth was looked at when the encodings were chosen: it is left out.
QUESTIONS = [at for at in range(50) if at % 4 in (1, 3)]


def token_vectors() -> tuple[TokenVectors, TokenVectors, dict[str, float]]:
    kept = home() / "cache" / "bench-late.npz"
    if not kept.is_file():
        data, encoder = load_retrieval("mrag-wikipedia"), Encoder(backend="torch")
        started = time.perf_counter()
        documents = encoder.encode_tokens(list(data.corpus.values()))
        spent = time.perf_counter() - started
        queries = encoder.encode_tokens(list(data.queries.values())[::5], query=True)
        kept.parent.mkdir(parents=True, exist_ok=True)
        made = {"D": documents.vectors.astype(np.float16), "Do": documents.offsets}
        np.savez(kept, **made, Q=queries.vectors, Qo=queries.offsets, seconds=spent)
    found = np.load(kept)
    times = {"encode_tokens_s": float(found["seconds"])} if "seconds" in found else {}
    return TokenVectors(found["D"].astype(np.float32), found["Do"]), TokenVectors(found["Q"], found["Qo"]), times


def timed(call: object, *given: object) -> tuple[object, float]:
    started = time.perf_counter()
    found = call(*given)  # type: ignore[operator]
    return found, 1000 * (time.perf_counter() - started)


def main() -> None:
    torch.set_num_threads(1)
    documents, queries, times = token_vectors()
    queries = queries.take(np.array(QUESTIONS))
    exact, scans = zip(*(timed(maxsim, query, documents) for query in queries), strict=True)
    top = [np.argsort(-scores, kind="stable")[:10] for scores in exact]
    rows = []
    for fitted in (False, True):
        for size, (k_sim, d_proj) in {"5,120": (4, 16), "10,240": (5, 16)}.items():
            encoder = FDEEncoder(documents.vectors.shape[1], k_sim=k_sim, r_reps=20, d_proj=d_proj)
            started = time.perf_counter()
            if fitted:
                encoder.fit(documents.vectors)
            index = MuveraIndex(encoder, documents)
            build = time.perf_counter() - started
            rows.append({"numbers": size, "fitted": fitted, "build_s": build, **measure(index, queries, top)})
            print(json.dumps(rows[-1]), flush=True)
    pooled = [query.mean(0) for query in queries]
    means = np.array([document.mean(0) for document in documents])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    orders = [np.argsort(-(means @ query), kind="stable") for query in pooled]
    result = {
        "data": "mrag-wikipedia, all-MiniLM-L6-v2 token vectors",
        "documents": len(documents),
        "tokens": len(documents.vectors),
        "questions": len(queries),
        "question_tokens": float(queries.lengths.mean()),
        "exact_scan_ms": float(np.median(scans)),
        "mean_pooling_recall": recalls(orders, top),
        "encodings": rows,
        **times,
        "machine": platform.machine(),
        "threads": 1,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def measure(index: MuveraIndex, queries: TokenVectors, top: list[np.ndarray]) -> dict[str, object]:
    spent: dict[str, list[float]] = {"encode_question": [], "candidates": [], "rescore": []}
    orders = []
    for query in queries:
        one = TokenVectors(query, np.array([0, len(query)]))
        _, milliseconds = timed(index.encoder.encode_queries, one)
        spent["encode_question"].append(milliseconds)
        found, both = timed(index.candidates, query, max(COUNTS))
        spent["candidates"].append(both - milliseconds)
        orders.append(np.asarray(found))
        _, milliseconds = timed(maxsim, query, index.documents.take(orders[-1][:100]))
        spent["rescore"].append(milliseconds)
    return {
        "recall": recalls(orders, top),
        "median_ms": {name: round(float(np.median(each)), 2) for name, each in spent.items()},
    }


def recalls(orders: list[np.ndarray], top: list[np.ndarray]) -> dict[str, dict[str, float]]:
    found = {}
    for count in COUNTS:
        each = [len(np.intersect1d(order[:count], of)) / 10 for order, of in zip(orders, top, strict=True)]
        interval = bootstrap_interval(np.array(each))
        found[str(count)] = {"value": interval.value, "low": interval.low, "high": interval.high}
    return found


if __name__ == "__main__":
    main()
