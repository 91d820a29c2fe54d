"""Heads with spans of their own: FlexAttention, which skips key blocks, beside SDPA with a mask in the same run.

Without gradients, float32, one text, 4 heads of 64. Three ways take turns: FlexAttention, SDPA with the same mask, and
SDPA over all of the past. Run: ``python benchmarks/flex.py``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from polyhead.attention.flex import _masked, flex_refusal, span_attention
from polyhead.attention.moa_sparse import ElasticSpan

HERE = Path(__file__).parent
HEADS, SIZE, SINKS = 4, 64, 4
LAYOUTS = {
    "3 heads look back 128, 1 all": [ElasticSpan(128)] * 3 + [ElasticSpan(0, 1)],
    "all heads look back 128": [ElasticSpan(128)] * 4,
    "all heads look back a quarter": [ElasticSpan(0, 0.25)] * 4,
}


def milliseconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    begin = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - begin)


def measured(layout: str, tokens: int, rounds: int) -> dict[str, Any]:
    """One layout at one length."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, SIZE, generator=generator) for _ in range(3))
    q = q * SIZE**-0.5
    spans = torch.tensor([span.fixed for span in LAYOUTS[layout]])
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "flex": lambda: span_attention(q, k, v, spans, SINKS),
        "SDPA with the mask": lambda: _masked(q, k, v, spans, SINKS),
        "SDPA over all": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0),
    }
    gap = (ways["flex"]() - ways["SDPA with the mask"]()).abs().max().item()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            times[name].append(milliseconds(way))
    taken = {name: statistics.median(each) for name, each in times.items()}
    ratios = [a / b for a, b in zip(times["flex"], times["SDPA with the mask"], strict=True)]
    return {
        "layout": layout,
        "tokens": tokens,
        "milliseconds": {name: round(each, 2) for name, each in taken.items()},
        "ratio to SDPA with the mask": round(statistics.median(ratios), 3),
        "ratio to SDPA over all": round(taken["flex"] / taken["SDPA over all"], 3),
        "largest difference": gap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="1024,2048,4096,8192")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "flex.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        few = [torch.randn(1, HEADS, 512, SIZE) for _ in range(3)]
        begin = time.perf_counter()
        if why := flex_refusal(*few):
            raise SystemExit(f"FlexAttention does not apply here: {why}.")
        compiled = time.perf_counter() - begin
        rows = []
        for tokens in map(int, given.tokens.split(",")):
            for layout in LAYOUTS:
                rows.append(measured(layout, tokens, given.rounds))
                print(json.dumps(rows[-1]), flush=True)
    found = {
        "heads": HEADS,
        "head_dim": SIZE,
        "threads": 1,
        "rounds": given.rounds,
        "seconds to compile and probe": round(compiled, 1),
        "rows": rows,
        "torch": version("torch"),
        "machine": platform.machine(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
