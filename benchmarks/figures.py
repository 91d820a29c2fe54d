"""Write the tables of ``docs/benchmarks.md`` from ``benchmarks/results/*.json``: a figure in the docs is never typed.

Run: ``python benchmarks/figures.py``. Each table stands between ``<!-- figures: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
RESULTS = HERE / "results"
QUALITY = {
    "mrag-wikipedia": ("recall@20[aspects>=2]", "recall@20[aspects=1]", "ndcg@10"),
    "cranfield": ("ndcg@10", "recall@20"),
    "limit-small": ("recall@2", "ndcg@10"),
}
Rows = list[list[str]]


def table(head: list[str], rows: Rows) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about(found: dict[str, Any]) -> str:
    """The machine and the versions a file was made with, in words."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    return f"Measured on {machine['processor']}, {machine['cores']} cores, {machine['system']}; {versions}."


def encode(found: dict[str, Any]) -> str:
    """Rates, ratios and cosines of ``encode.json``."""
    rates = found["docs_per_second"]
    rows = [
        ["sentence-transformers, texts/s", f"{rates['sentence-transformers']:.1f}"],
        ["OpenVINO bf16, texts/s", f"{rates['openvino-bf16']:.1f}"],
        ["Polyhead with head vectors, texts/s", f"{rates['polyhead-heads']:.1f}"],
        ["ratio to sentence-transformers", f"{found['ratio_to_sentence_transformers']:.2f}"],
        ["ratio to OpenVINO bf16", f"{found['ratio_to_openvino_bf16']:.2f}"],
        ["GFLOP a text", f"{found['gflop_per_text']:.2f}"],
        ["ceiling, GFLOP/s (best of all rounds)", f"{found['ceiling_gflops']:.0f}"],
        ["share of the ceiling (median of rounds)", f"{found['share_of_ceiling']:.2f}"],
        ["least cosine to float32, dense", f"{found['min_cosine_dense']:.5f}"],
        ["least cosine to float32, heads", f"{found['min_cosine_heads']:.5f}"],
    ]
    rounds = len(found["rounds"]["ceiling_gflops"])
    words = f"{about(found)} {found['texts']} texts of {found['tokens_per_text']} tokens, {found['source']}"
    return f"{words}; {rounds} rounds.\n\n{table(['figure', 'value'], rows)}"


def leaves(value: Any, name: str = "") -> Rows:
    """Every number in nested values with its dotted name."""
    if isinstance(value, dict):
        return [row for key, inner in value.items() for row in leaves(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list):
        return [row for at, inner in enumerate(value) for row in leaves(inner, f"{name}.{at}")]
    return [[f"`{name}`", f"{value:.4g}" if isinstance(value, float) else str(value)]]


def search(found: dict[str, Any]) -> str:
    """All figures of ``search.json`` by name."""
    figures = {key: value for key, value in found.items() if key not in ("machine", "versions", "rounds")}
    return f"{about(found)}\n\n{table(['figure', 'value'], leaves(figures))}"


def cache(found: dict[str, Any]) -> str:
    """Time a token and bytes of ``cache.json``."""
    rows = [
        [
            row["dtype"],
            f"{row['tokens']:,}",
            row["policy"],
            f"{row['ms_a_token']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['bytes_ratio']:.3f}",
        ]
        for row in found["rows"]
    ]
    return table(["dtype", "tokens", "cache", "ms a token", "x own cache", "MiB held", "x own cache"], rows)


def heads(found: dict[str, Any]) -> str:
    """What measuring heads costs, by subject, of ``heads.json``."""
    wanted = {
        "recording, in plain forward passes": ("recording", "ratio"),
        "gradient importance, in forward passes": ("gradient", "forwards"),
        "exact ablation of all heads, in plain loops": ("ablation", "ratio"),
        "the same with padding left in": ("ablation", "ratio_without_trimming"),
        "largest difference of a loss to the plain loop": ("ablation", "ratio_largest_difference_of_a_loss"),
        "attribution patching, in two forwards and a backward": ("patching", "ratio"),
        "Spearman of gradient importance with exact ablation": ("agreement", "absolute"),
        "the same with the sign kept": ("agreement", "signed"),
    }
    subjects = found["subjects"]

    def cell(values: dict[str, Any], measurement: str, figure: str) -> str:
        value = values.get(measurement, {}).get(figure)
        return "" if value is None else f"{value:.2g}" if 0 < value < 0.01 else f"{value:.2f}"

    rows = [[words, *(cell(values, *where) for values in subjects.values())] for words, where in wanted.items()]
    return table(["CPU time on one thread", *subjects], rows)


def late(found: dict[str, Any]) -> str:
    """How much of exact MaxSim each kind of candidates holds, and what each stage takes."""

    def recall(values: dict[str, Any], count: str) -> str:
        return f"{values[count]['value']:.3f} ({values[count]['low']:.2f}–{values[count]['high']:.2f})"

    rows = []
    for one in found["encodings"]:
        stages = [f"{one['median_ms'][stage]:.1f}" for stage in ("encode_question", "candidates", "rescore")]
        name = f"{one['numbers']} numbers{', fitted' if one['fitted'] else ''}"
        rows.append([name, recall(one["recall"], "100"), recall(one["recall"], "200"), *stages])
    pooled = found["mean_pooling_recall"]
    rows.append(["mean of the token vectors", recall(pooled, "100"), recall(pooled, "200"), "", "", ""])
    words = (
        f"{found['data']}: {found['documents']:,} documents of {found['tokens']:,} tokens, {found['questions']} "
        f"questions of {found['question_tokens']:.0f} tokens, {found['threads']} thread. An exact scan of all takes "
        f"{found['exact_scan_ms']:,.0f} ms a question."
    )
    head = ["candidates by", "recall of MaxSim's first 10 in 100", "in 200", "encode, ms", "find, ms", "score, ms"]
    return f"{words}\n\n{table(head, rows)}"


def head_pooling(found: dict[str, Any]) -> str:
    """Spearman on STS 2015 of each fitted vector."""
    rows = []
    for one in found["rows"]:
        low, high = one["interval"]
        gain = "" if "difference" not in one else f"{one['difference']:+.3f}"
        if "difference_interval" in one:
            gain += " ({:+.3f} to {:+.3f})".format(*one["difference_interval"])
        pairs = str(one.get("pairs", "")) if one["vector"] != "dense" else ""
        rows.append([one["model"], one["vector"], pairs, f"{one['spearman']:.3f} ({low:.3f}–{high:.3f})", gain])
    return table(["model", "vector", "scored pairs", "mean Spearman, STS 2015", "beside dense"], rows)


def serve(found: dict[str, Any]) -> str:
    """Throughput and latency of the service beside the bare engine."""
    rows = [
        [
            str(one["clients"]),
            f"{one['texts_per_second']:.0f}",
            f"{one['ratio']:.2f}",
            *(f"{one[name]:,.0f}" for name in ("p50_ms", "p95_ms", "p99_ms")),
            str(one["requests"]),
            str(one["out_of_order"] + one["refused"]),
            f"{one['least_cosine_to_the_engines']:.5f}",
        ]
        for one in found["rows"]
    ]
    memory = found["memory_mib"]
    words = (
        f"{found['backend']}, {found['machine']['cores']} cores shared with the clients, {found['texts_a_request']} "
        f"texts a request. Memory after warming {memory['after_warming']:.0f} MiB, "
        f"{memory['grown']:.0f} more at the end."
    )
    head = [
        "clients",
        "texts/s",
        "of the bare engine",
        "p50, ms",
        "p95",
        "p99",
        "requests",
        "wrong or refused",
        "least cosine",
    ]
    return f"{words}\n\n{table(head, rows)}"


def quality(reports: dict[str, dict[str, Any]]) -> str:
    """Chosen metrics of the evaluation reports, a table for each data set."""
    parts = []
    for name, report in reports.items():
        meta, results = report["meta"], report["results"]
        metrics = [metric for metric in QUALITY[name] if metric in next(iter(results.values()))]
        differs = {(test["b"], test["metric"]) for test in report["comparisons"] if test["p_holm"] < 0.05}
        rows = []
        for strategy, values in results.items():
            cells = []
            for metric in metrics:
                mean, low, high = (values[metric][key] for key in ("value", "low", "high"))
                mark = "\\*" if (strategy, metric) in differs else ""
                cells.append(f"{mean:.3f}{mark} ({low:.2f}–{high:.2f})")
            rows.append([f"`{strategy}`", *cells])
        counts = ", ".join(f"{metric}: {next(iter(results.values()))[metric]['n']} questions" for metric in metrics)
        words = f"**{name}**, {meta['model']}, {meta['backend']}, {meta['machine']}. {counts}."
        parts.append(f"{words}\n\n{table(['strategy', *metrics], rows)}")
    return "\n\n".join(parts)


def figures() -> dict[str, str]:
    """The text of each block; a benchmark that has not run says so."""

    def read(name: str) -> dict[str, Any] | None:
        file = RESULTS / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def block(name: str, make: Callable[[dict[str, Any]], str]) -> str:
        found = read(name)
        return make(found) if found else f"No results yet: `benchmarks/results/{name}.json` does not exist."

    reports = {name: found for name in QUALITY if (found := read(name))}
    blocks = {name: block(name, make) for name, make in (("encode", encode), ("search", search))}
    blocks |= {name: block(name, make) for name, make in (("heads", heads), ("cache", cache))}
    made = (("late", late), ("head_pooling", head_pooling), ("serve", serve))
    blocks |= {name: block(name, make) for name, make in made}
    return {**blocks, "quality": quality(reports)}


def filled(page: str) -> str:
    """The page with its tables."""
    for name, text in figures().items():
        pattern = rf"(<!-- figures: {name} -->\n).*?(<!-- end -->)"
        page, count = re.subn(
            pattern, lambda found, text=text: f"{found[1]}\n{text}\n\n{found[2]}", page, flags=re.DOTALL
        )
        if count != 1:
            raise SystemExit(f"{PAGE} has {count} places for the figures '{name}', expected one.")
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
