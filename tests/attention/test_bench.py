"""The bench: what it counts, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from polyhead.attention import Attention, AttentionShape, LinearAttention
from polyhead.attention.bench import BenchRow, _peak_mib, bench, crossover, growth
from polyhead.attention.super_attention import SuperAttention
from polyhead.cli.app import app
from polyhead.errors import InputError

SHAPE = AttentionShape(32, 4)


def row(name: str, tokens: int, milliseconds: float, ratio: float) -> BenchRow:
    return BenchRow(name, tokens, milliseconds, ratio, 0.0, None)


def test_every_layer_at_every_length() -> None:
    layers = {"mha": Attention(SHAPE, causal=True), "linear": LinearAttention(SHAPE, causal=True)}
    rows = bench(layers, [16, 64], rounds=1, seconds=math.inf)
    assert [(each.name, each.tokens) for each in rows] == [("mha", 16), ("linear", 16), ("mha", 64), ("linear", 64)]
    assert rows[0].cache_bytes == 2 * 32 * 16 * 2
    assert rows[1].cache_bytes == rows[3].cache_bytes == 4 * 8 * 9 * 2


def test_a_layer_of_fixed_length_has_no_row_beyond_it() -> None:
    rows = bench({"super": SuperAttention(SHAPE, causal=True, max_len=16)}, [8, 32], rounds=1)
    assert [each.tokens for each in rows] == [8]


def test_growth_and_crossover() -> None:
    rows = [row("a", 100, 1.0, 2.0), row("a", 200, 4.0, 0.5), row("a", 400, 16.0, 1.5), row("a", 800, 64.0, 0.9)]
    assert growth(rows, "a") == pytest.approx(2.0)
    assert crossover(rows, "a") == 800
    assert crossover(rows[:3], "a") is None
    assert growth(rows[:1], "a") is None


def test_peak_is_what_was_held_at_once() -> None:
    def run() -> torch.Tensor:
        first = torch.empty(2**20)
        del first
        second, third = torch.empty(2**20), torch.empty(2**19)
        return second[0] + third[0]

    assert _peak_mib(run) == pytest.approx(6.0, abs=0.1)


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="whole numbers"):
        bench({"mha": Attention(SHAPE)}, [0])
    with pytest.raises(InputError, match="several widths"):
        bench({"a": Attention(SHAPE), "b": Attention(AttentionShape(64, 4))}, [4])


def test_command_prints_json() -> None:
    ran = CliRunner().invoke(
        app, ["attention", "bench", "linear", "mha", "--tokens", "8,32", "--rounds", "1", "--json"]
    )
    assert ran.exit_code == 0, ran.output
    found = json.loads(ran.stdout)
    assert {each["name"] for each in found["rows"]} == {"linear", "mha"}
    assert set(found["growth"]) == {"linear", "mha"}


def test_command_lists_and_refuses() -> None:
    listed = CliRunner().invoke(app, ["attention", "list", "--json"])
    assert "qknorm" in {each["name"] for each in json.loads(listed.stdout)}
    wrong = CliRunner().invoke(app, ["attention", "bench", "linnear"])
    assert wrong.exit_code != 0
