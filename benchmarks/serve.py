"""The service under load, driven from this process over loopback, beside the bare engine in the same run.

``python benchmarks/serve.py [--seconds 10] [--texts 16]`` writes ``benchmarks/results/serve.json``: throughput and
latency at 1, 8 and 64 clients, each of which asks again as soon as it is answered; whether an answer was lost, came
twice or was another's; and the memory of the service before and after. The model is all-MiniLM-L6-v2, texts are ag-news
items.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from polyhead.data import load_texts
from polyhead.embed import Encoder

RESULT = Path(__file__).parent / "results" / "serve.json"
CLIENTS = (1, 8, 64)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def post(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: bytes) -> tuple[int, bytes]:
    """One request on an open connection: httpx would take a good part of the processors this measures."""
    fields = f"host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    head = f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n"
    writer.write(head.encode() + body)
    header = await reader.readuntil(b"\r\n\r\n")
    length = int(header.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    return int(header.split(b" ", 2)[1]), await reader.readexactly(length)


async def client(port: int, texts: list[str], first: int, size: int, until: float, told: dict[str, Any]) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    number = first
    while time.perf_counter() < until:
        own = [texts[(number + i) % len(texts)] for i in range(size)]
        body = json.dumps({"input": own, "encoding_format": "base64"}).encode()
        started = time.perf_counter()
        status, answer = await post(reader, writer, "/v1/embeddings", body)
        told["seconds"].append(time.perf_counter() - started)
        if status == 429:
            told["refused"] += 1
            await asyncio.sleep(0.05)
            continue
        items = json.loads(answer)["data"]
        told["texts"] += len(items)
        told["wrong"] += [item["index"] for item in items] != list(range(size))
        if len(told["kept"]) < 200:
            told["kept"].append((number, np.frombuffer(base64.b64decode(items[-1]["embedding"]), "<f4")))
        number += 7 * size
    writer.close()


async def drive(port: int, texts: list[str], clients: int, size: int, seconds: float) -> dict[str, Any]:
    told: dict[str, Any] = {"seconds": [], "texts": 0, "wrong": 0, "refused": 0, "kept": []}
    started = time.perf_counter()
    await asyncio.gather(*(client(port, texts, 31 * i, size, started + seconds, told) for i in range(clients)))
    told["took"] = time.perf_counter() - started
    return told


def bare(encoder: Encoder, texts: list[str], seconds: float) -> float:
    """Texts a second of the engine alone, on the service's batch size."""
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        first = done % max(1, len(texts) - 256)
        encoder.encode(texts[first : first + 256])
        done += 256
    return done / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--texts", type=int, default=16, help="of each request")
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    texts = load_texts("ag-news")[:4000]
    encoder = Encoder(backend=options.backend)
    encoder.calibrate() if options.backend == "auto" else None
    encoder.encode(texts[:512])
    port = free_port()
    command = [sys.executable, "-m", "polyhead", "serve", "--port", str(port), "--backend", options.backend]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until_ready(port)
        asyncio.run(drive(port, texts, max(CLIENTS), options.texts, 5))  # to the largest passes there will be
        memory = psutil.Process(server.pid).memory_info().rss
        rows = []
        for clients in CLIENTS:
            before = bare(encoder, texts, options.seconds / 2)
            told = asyncio.run(drive(port, texts, clients, options.texts, options.seconds))
            engine = (before + bare(encoder, texts, options.seconds / 2)) / 2
            rows.append(row(told, clients, options.texts, engine, encoder, texts))
            print(rows[-1])
        grown = psutil.Process(server.pid).memory_info().rss - memory
    finally:
        server.terminate()
        server.wait(30)
    result = {
        "machine": {"cores": os.cpu_count()},
        "backend": encoder.backend,
        "texts_a_request": options.texts,
        "rows": rows,
        "memory_mib": {"after_warming": memory / 2**20, "grown": grown / 2**20},
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def row(
    told: dict[str, Any], clients: int, size: int, engine: float, encoder: Encoder, texts: list[str]
) -> dict[str, Any]:
    asked = [texts[(number + size - 1) % len(texts)] for number, _ in told["kept"]]
    expected = encoder.encode(asked).dense
    cosine = [float(a @ b) for a, (_, b) in zip(expected, told["kept"], strict=True)]
    p50, p95, p99 = (1000 * float(np.percentile(told["seconds"], q)) for q in (50, 95, 99))
    rate = told["texts"] / told["took"]
    return {
        "clients": clients,
        "texts_per_second": rate,
        "engine_texts_per_second": engine,
        "ratio": rate / engine,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "requests": len(told["seconds"]),
        "out_of_order": told["wrong"],
        "refused": told["refused"],
        "least_cosine_to_the_engines": min(cosine),
    }


def wait_until_ready(port: int) -> None:
    import urllib.request

    for _ in range(600):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit("the service did not start")


if __name__ == "__main__":
    main()
