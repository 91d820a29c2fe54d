"""Encoding speed against peers, as ratios and as a share of what this machine's matrix multiplication can do.

All peers encode the same texts of 238 tokens with all-MiniLM-L6-v2 in one process, tokenizing included, one after the
other in every round; figures are medians over rounds. Run: ``python benchmarks/encode.py [--texts N] [--rounds R]``.

Floating-point operations of a text of T tokens in a model of L layers, hidden size d and inner size f:
``L * (2 T (4 d^2 + 2 d f) + 4 T^2 d)``: four projections, the two layers of the perceptron, scores and values.
Norms, activations, embeddings and pooling are not counted.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

TOKENS = 238
HERE = Path(__file__).parent
Peer = Callable[[list[str]], np.ndarray]


def source_text() -> tuple[str, str]:
    """Running prose and its name: Wikipedia articles where the data is, else Python's own manual pages."""
    data = Path(os.environ.get("POLYHEAD_DATA") or HERE.parents[1] / "shared" / "data")
    articles = data / "mrag-wikipedia" / "articles.json.gz"
    if articles.is_file():
        with gzip.open(articles, "rt", encoding="utf-8") as content:
            return "\n".join(article["text"] for article in json.load(content)), "mrag-wikipedia articles"
    from pydoc_data.topics import topics

    return "\n".join(topics.values()), "Python's manual pages"


def texts_of_length(tokenizer: Any, count: int, tokens: int) -> tuple[list[str], str]:
    """Different texts that have exactly so many tokens, special tokens included."""
    text, name = source_text()
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    content = tokens - tokenizer.num_special_tokens_to_add()
    found = []
    for begin in range(0, len(offsets) - content, content):
        piece = text[offsets[begin][0] : offsets[begin + content - 1][1]]
        if len(tokenizer(piece)["input_ids"]) == tokens:
            found.append(piece)
        if len(found) == count:
            return found, name
    raise SystemExit(f"{name} hold {len(found)} texts of {tokens} tokens, {count} were asked for; give a lower --texts")


def flops_per_text(config: Any, tokens: int) -> float:
    """See the formula at the top of this file."""
    d, f = config.hidden_size, config.intermediate_size
    return float(config.num_hidden_layers * (2 * tokens * (4 * d * d + 2 * d * f) + 4 * tokens * tokens * d))


def matmul_ceiling(seconds: float = 1.0) -> float:
    """bf16 GFLOP/s of a large square matrix multiplication in torch, the best within some time."""
    import torch

    best = 0.0
    for size in (2048, 4096):
        a, b = (torch.randn(size, size).to(torch.bfloat16) for _ in range(2))
        torch.mm(a, b)
        stop = time.perf_counter() + seconds / 2
        while time.perf_counter() < stop:
            begin = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * size**3 / (time.perf_counter() - begin) / 1e9)
    return best


def sentence_transformers_peer(folder: str) -> Peer:
    """sentence-transformers as it comes: torch, float32, batches of 32."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device="cpu")
    return lambda texts: model.encode(texts, show_progress_bar=False)


def plain_openvino_peer(folder: str, tokenizer: Any) -> Peer:
    """The model alone in OpenVINO with bf16, batches of 32, mean pooling in NumPy: what a careful user would write."""
    import openvino
    import torch
    from transformers import AutoModel

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder).eval()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    example = tokenizer(["two examples", "of different lengths, padded"], padding=True, return_tensors="pt")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = {"input_ids": example["input_ids"], "attention_mask": example["attention_mask"]}
        converted = openvino.convert_model(States(), example_input=inputs)
    compiled = openvino.Core().compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})

    def encode(texts: list[str]) -> np.ndarray:
        vectors = []
        for first in range(0, len(texts), 32):
            batch = tokenizer(texts[first : first + 32], padding=True, truncation=True, return_tensors="np")
            mask = batch["attention_mask"]
            states = compiled({"input_ids": batch["input_ids"], "attention_mask": mask})[0]
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            vectors.append(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
        return np.concatenate(vectors)

    return encode


def min_cosine(found: np.ndarray, reference: np.ndarray) -> float:
    """Least cosine between vectors of the last axis."""
    norms = np.linalg.norm(found, axis=-1) * np.linalg.norm(reference, axis=-1)
    return float((np.sum(found * reference, axis=-1) / norms).min())


def measure(texts: list[str], rounds: int, folder: str, tokenizer: Any) -> dict[str, Any]:
    """Rates of all peers and of the ceiling by round, and how near our vectors are to float32."""
    from polyhead.embed import Encoder

    with tempfile.TemporaryDirectory() as cache:
        encoder = Encoder(folder, backend="openvino", precision="bf16", cache_dir=cache)
        reference = Encoder(folder, backend="torch", precision="fp32", cache_dir=cache).encode(texts[:64], heads=True)
        peers: dict[str, Peer] = {
            "sentence-transformers": sentence_transformers_peer(folder),
            "openvino-bf16": plain_openvino_peer(folder, tokenizer),
            "polyhead-heads": lambda given: encoder.encode(given, heads=True).dense,
        }
        for encode in peers.values():
            encode(texts[:64])
        rates: dict[str, list[float]] = {name: [] for name in peers}
        ceilings = []
        for _ in range(rounds):
            ceilings.append(matmul_ceiling())
            for name, encode in peers.items():
                begin = time.perf_counter()
                encode(texts)
                rates[name].append(len(texts) / (time.perf_counter() - begin))
        ours = encoder.encode(texts[:64], heads=True)
    assert ours.heads is not None
    assert reference.heads is not None
    return {
        "rates": rates,
        "ceilings": ceilings,
        "min_cosine_dense": min_cosine(ours.dense, reference.dense),
        "min_cosine_heads": min_cosine(ours.heads, reference.heads),
    }


def report(measured: dict[str, Any], flops: float, about: dict[str, Any]) -> dict[str, Any]:
    """The figures by name; a ratio is the median of the ratios within each round, so that slow spells cancel."""
    rates, ceilings = measured["rates"], measured["ceilings"]
    ours = rates["polyhead-heads"]

    def ratio(peer: str) -> float:
        return statistics.median(a / b for a, b in zip(ours, rates[peer], strict=True))

    shares = [rate * flops / 1e9 / ceiling for rate, ceiling in zip(ours, ceilings, strict=True)]
    return {
        **about,
        "docs_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "ratio_to_sentence_transformers": ratio("sentence-transformers"),
        "ratio_to_openvino_bf16": ratio("openvino-bf16"),
        "gflop_per_text": flops / 1e9,
        "ceiling_gflops": max(ceilings),
        "share_of_ceiling": statistics.median(shares),
        "share_of_best_ceiling": statistics.median(ours) * flops / 1e9 / max(ceilings),
        "min_cosine_dense": measured["min_cosine_dense"],
        "min_cosine_heads": measured["min_cosine_heads"],
        "rounds": {"docs_per_second": rates, "ceiling_gflops": ceilings},
    }


def machine() -> dict[str, Any]:
    """Processor, cores and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    packages = ("torch", "transformers", "sentence-transformers", "openvino", "numpy")
    return {
        "machine": {"processor": model or platform.processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description="Encoding speed against peers")
    parser.add_argument("--texts", type=int, default=256, help="texts in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "encode.json")
    arguments = parser.parse_args()
    from transformers import AutoConfig, AutoTokenizer

    from polyhead.hub import DEFAULT_MODEL, resolve

    folder = resolve(DEFAULT_MODEL).path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts, source = texts_of_length(tokenizer, arguments.texts, TOKENS)
    measured = measure(texts, arguments.rounds, folder, tokenizer)
    about = {**machine(), "model": DEFAULT_MODEL, "texts": len(texts), "tokens_per_text": TOKENS, "source": source}
    figures = report(measured, flops_per_text(AutoConfig.from_pretrained(folder), TOKENS), about)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: value for name, value in figures.items() if name != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
