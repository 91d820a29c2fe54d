"""Decoding one token at a time: caches with a budget for each head beside transformers' own, in the same run.

A decoder of Llama's form with random weights (4 layers, 8 query heads on 4 key-value heads of 64) takes its keys and
values from a long made-up text, then writes; policies take turns. Run: ``python benchmarks/cache.py``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import polyhead
from polyhead.cache import CachePolicy, HeadKVPolicy, RazorPolicy, WindowPolicy
from polyhead.headmap import HeadMap

HERE = Path(__file__).parent
LAYERS, HEADS, KV_HEADS, SIZE = 4, 8, 4, 64


def decoder(dtype: torch.dtype) -> polyhead.HeadedModel:
    """The model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=HEADS * SIZE,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=32_768,
    )
    return polyhead.load(AutoModelForCausalLM.from_config(config).eval().to(dtype))


def policies() -> dict[str, CachePolicy | None]:
    """Those compared; None is transformers' own cache."""
    scores = HeadMap(np.random.default_rng(0).random((LAYERS, HEADS)), name="random")
    return {
        "transformers' own": None,
        "whole": WindowPolicy(protect=1.0),
        "window 256, a quarter protected": WindowPolicy(scores, protect=0.25, window=252),
        "razor 256, a quarter protected": RazorPolicy(scores, protect_induction=0.25, window=252),
        "headkv, 256 a head on average": HeadKVPolicy(scores, base=248),
    }


def fill(cache: Any, tokens: int, dtype: torch.dtype) -> None:
    """Keys and values of ``tokens`` tokens in every layer, settled as after reading a text."""
    generator = torch.Generator().manual_seed(1)
    for layer in cache.layers:
        keys, values = (torch.randn(1, KV_HEADS, tokens, SIZE, generator=generator).to(dtype) for _ in range(2))
        layer.update(keys, values)
        if hasattr(layer, "settle"):
            layer.settle(torch.randn(1, HEADS, 16, SIZE, generator=generator).to(dtype), None, SIZE**-0.5)


def decode(model: polyhead.HeadedModel, policy: CachePolicy | None, tokens: int, steps: int) -> tuple[float, int]:
    """Median milliseconds a token, and bytes the cache holds at the end."""

    def run(cache: Any) -> float:
        fill(cache, tokens, model.dtype)
        taken = []
        with torch.inference_mode():
            for step in range(steps):
                begin = time.perf_counter()
                model.module(input_ids=torch.tensor([[step]]), past_key_values=cache)
                taken.append(time.perf_counter() - begin)
        return 1000 * statistics.median(taken[2:])

    if policy is None:
        cache = DynamicCache(config=model.config)
        milliseconds = run(cache)
        held = [each for layer in cache.layers for each in (layer.keys, layer.values)]
        return milliseconds, sum(each.untyped_storage().nbytes() for each in held)
    with policy.on(model) as own:
        return run(own), own.bytes


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cache.json")
    arguments = parser.parse_args()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        model = decoder(dtype)
        decode(model, None, 64, 8)  # the first passes of a process are slower
        for tokens in arguments.tokens:
            times: dict[str, list[float]] = {}
            held: dict[str, int] = {}
            for _ in range(arguments.rounds):
                for name, policy in policies().items():
                    milliseconds, held[name] = decode(model, policy, tokens, arguments.steps)
                    times.setdefault(name, []).append(milliseconds)
            plain, plain_bytes = statistics.median(times["transformers' own"]), held["transformers' own"]
            for name, taken in times.items():
                row = {"policy": name, "dtype": str(dtype).removeprefix("torch."), "tokens": tokens}
                row |= {"ms_a_token": statistics.median(taken), "ratio": statistics.median(taken) / plain}
                row |= {"bytes": held[name], "bytes_ratio": held[name] / plain_bytes}
                rows.append(row)
                print(json.dumps(row), flush=True)
    result = {
        "what": "median milliseconds a token of decoding and bytes held; see benchmarks/cache.py",
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("polyhead", "torch", "transformers")},
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
