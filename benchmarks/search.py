"""Search latency and memory against FAISS flat, the index path's recall, and the cost of a run that finds no change.

Vectors are synthetic (clustered, unit length, 384 dimensions dense and 384 of heads), stored through the product's own
store. Every round times one query at a time with both, in one process; a ratio is the median of the rounds' ratios.
The last part indexes 5,000 real small files with the packaged model and runs ``polyhead index`` again.
Run: ``python benchmarks/search.py [--sizes 1000 10000 100000] [--queries N]``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from encode import machine

HERE = Path(__file__).parent
DIM, LAYERS, HEADS, HEAD_DIM, K = 384, 1, 12, 32, 10
ROUNDS = 5


def clustered(n: int, seed: int, clusters: int = 500) -> np.ndarray:
    """``[n, 384]`` float32 of unit length around ``clusters`` centres."""
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(1).standard_normal((clusters, DIM))
    vectors = centres[generator.integers(0, clusters, n)] + 0.7 * generator.standard_normal((n, DIM))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make_store(uri: str, vectors: np.ndarray) -> float:
    """Fill a store; rows a second, upkeep included."""
    import pyarrow as pa

    from polyhead.search.planner import SearchLimits
    from polyhead.search.schema import IndexMeta, chunk_schema, fixed_size_lists
    from polyhead.search.store import Store

    mean = np.zeros((LAYERS, HEADS, HEAD_DIM), np.float32)
    meta = IndexMeta("synthetic", "none", DIM, (LAYERS, HEADS, HEAD_DIM), settings={}, head_mean=mean)
    schema = chunk_schema(meta)
    started = time.perf_counter()
    store = Store.create(uri, meta)
    for first in range(0, len(vectors), 10_000):
        part = vectors[first : first + 10_000]
        n = len(part)
        names = [f"d{first + i:07d}" for i in range(n)]
        moment = pa.array([1_700_000_000_000_000] * n).cast(schema.field("modified").type)
        columns: dict[str, Any] = {
            **{"id": [f"{name}#0" for name in names], "doc_id": names, "path": [f"{name}.txt" for name in names]},
            **{"title": names, "heading": [None] * n, "kind": ["txt"] * n, "size": [100] * n, "modified": moment},
            **{"start": [0] * n, "end": [100] * n, "text": ["text"] * n, "content_hash": ["x"] * n},
            **{"attributes": ["{}"] * n, "dense": fixed_size_lists(part)},
            "heads": fixed_size_lists((part * np.float32(HEADS**0.5)).astype(np.float16)),
            "head_norms": fixed_size_lists(np.ones((n, LAYERS * HEADS), np.float32)),
        }
        arrays = [pa.array(columns[name], schema.field(name).type) for name in schema.names]
        store.upsert(pa.table(arrays, schema=schema))
    store.tidy(exact_rows=SearchLimits().exact_rows, force=True)
    return len(vectors) / (time.perf_counter() - started)


def times(search: Callable[[np.ndarray], Any], queries: np.ndarray) -> list[float]:
    """Seconds of each query, one at a time."""
    taken = []
    for query in queries:
        begin = time.perf_counter()
        search(query[None])
        taken.append(time.perf_counter() - begin)
    return taken


def spread(seconds: list[float]) -> dict[str, float]:
    """p50 and p95 in milliseconds."""
    return {"p50_ms": 1e3 * float(np.quantile(seconds, 0.5)), "p95_ms": 1e3 * float(np.quantile(seconds, 0.95))}


def peak(kind: str, uri: str, n: int) -> float:
    """Peak memory in MiB of a fresh process that loads the vectors with one engine and asks one question."""
    out = subprocess.run([sys.executable, __file__, "--child", kind, uri, str(n)], capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(out.stderr)
    return float(out.stdout)


def high_water() -> float:
    """Peak resident memory of this process in KiB. (ru_maxrss would start from the parent's.)"""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return float(status.partition("VmHWM:")[2].split()[0])


def child(kind: str, uri: str, n: int) -> None:
    """What :func:`peak` runs: the rise of peak memory above what the imports take, as both load from the store."""
    query = clustered(1, seed=9)
    if kind == "faiss":
        import faiss

        vectors = np.load(Path(uri).with_suffix(".npy"), mmap_mode="r")
        before = high_water()
        index = faiss.IndexFlatIP(DIM)
        for first in range(0, n, 10_000):
            index.add(np.asarray(vectors[first : first + 10_000]))
        index.search(query, K)
    else:
        from polyhead.search.store import Store

        store = Store.open(uri)
        before = high_water()
        store.view().nearest(query, "dense", K)
    print((high_water() - before) / 1024)


def size(n: int, queries: int, folder: Path) -> dict[str, Any]:
    """All figures of one table size."""
    import faiss

    from polyhead.search.planner import SearchLimits
    from polyhead.search.store import Store

    faiss.omp_set_num_threads(2)
    vectors, asked = clustered(n, seed=n), clustered(queries, seed=5)
    uri = str(folder / f"index-{n}")
    np.save(Path(uri).with_suffix(".npy"), vectors)
    rate = make_store(uri, vectors)
    flat = faiss.IndexFlatIP(DIM)
    flat.add(vectors)
    begin = time.perf_counter()
    view = Store.open(uri).view()
    found, _ = view.nearest(asked[:1], "dense", K)
    first = time.perf_counter() - begin
    flat.search(asked[:1], K)
    ours: list[float] = []
    theirs: list[float] = []
    ratios = []
    for _ in range(ROUNDS):
        a = times(lambda query: view.nearest(query, "dense", K), asked)
        b = times(lambda query: flat.search(query, K), asked)
        ratios.append(statistics.median(a) / statistics.median(b))
        ours += a
        theirs += b
    _, true = flat.search(asked, K)
    found, _ = view.nearest(asked, "dense", K)
    same = np.mean([len(np.intersect1d(x, y)) / K for x, y in zip(found, true, strict=True)])
    report = {
        "chunks": n,
        "plan": view.plan,
        "rows_per_second": rate,
        "first_query_ms": 1e3 * first,
        "polyhead": spread(ours),
        "faiss_flat": spread(theirs),
        "ratio_p50": statistics.median(ratios),
        "recall_at_10": float(same),
        "peak_mib": {"polyhead": peak("polyhead", uri, n), "faiss_flat": peak("faiss", uri, n)},
    }
    if n >= 10_000:
        store = Store.open(uri)
        begin = time.perf_counter()
        store.tidy(exact_rows=0)
        report["ivf_sq"] = {"build_s": time.perf_counter() - begin}
        indexed = Store.open(uri).view(limits=SearchLimits(exact_rows=0))
        taken = times(lambda query: indexed.nearest(query, "dense", K), asked)
        got, _ = indexed.nearest(asked, "dense", K)
        ids = [[row["doc_id"] for row in indexed.fetch(rows)] for rows in got]
        wanted = [[f"d{row:07d}" for row in rows] for rows in true]
        hits = np.mean([len(set(x) & set(y)) / K for x, y in zip(ids, wanted, strict=True)])
        report["ivf_sq"] |= {**spread(taken), "recall_at_10": float(hits), "plan": indexed.plan}
    return report


PROOF = """
import sys, time
begin = time.perf_counter()
from polyhead.cli.app import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    code = end.code
heavy = [name for name in ("torch", "openvino", "transformers", "sentence_transformers") if name in sys.modules]
print("PROOF", time.perf_counter() - begin, heavy, code)
"""


def unchanged(files: int, folder: Path) -> dict[str, Any]:
    """Wall time of ``polyhead index`` of a folder without changes, start of Python included, and what it imported."""
    docs, uri = folder / "files", folder / "files-index"
    words = np.random.default_rng(0)
    for number in range(files):
        target = docs / f"{number % 50}" / f"{number}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"note {number}: " + " ".join(f"word{w}" for w in words.integers(0, 900, 12)))
    command = [sys.executable, "-c", PROOF, "index", str(docs), "--index", str(uri), "--json"]
    taken, heavy = [], ""
    for _ in range(4):
        begin = time.perf_counter()
        out = subprocess.run(command, capture_output=True, text=True)
        taken.append(time.perf_counter() - begin)
        heavy = out.stdout.rpartition("PROOF")[2].strip()
        time.sleep(0.2)
    report = json.loads(out.stdout.rpartition("PROOF")[0])
    return {
        "files": files,
        "first_run_s": taken[0],
        "unchanged_s": statistics.median(taken[1:]),
        "unchanged_files": report["unchanged"],
        "imported": heavy.partition("[")[2].partition("]")[0],
    }


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description="Search latency and memory against FAISS flat")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--files", type=int, default=5_000)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "search.json")
    parser.add_argument("--child", nargs=3, metavar=("KIND", "URI", "N"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], arguments.child[1], int(arguments.child[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        sizes = [size(n, arguments.queries, Path(folder)) for n in arguments.sizes]
        again = unchanged(arguments.files, Path(folder))
    figures = {**machine(), "k": K, "dim": DIM, "sizes": sizes, "unchanged_folder": again}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
