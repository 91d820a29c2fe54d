"""The command line as a user meets it: help, version, papers, models, errors, exit status."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-m", "polyhead", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", **env},
        check=False,
    )


def test_version_and_help():
    assert run("--version").stdout.startswith("polyhead 0.")
    shown = run("--help").stdout
    for command in ("search", "index", "evaluate", "models", "papers", "heads", "claims"):
        assert command in shown
    assert "--strategy" in run("search", "--help").stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['polyhead', '--help']\n"
        "from polyhead.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'lancedb', 'openvino', 'pandas', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_papers_list_and_one():
    cards = json.loads(run("papers", "--json").stdout)
    assert len(cards) == 349
    one = json.loads(run("papers", "mrag", "--json").stdout)
    assert one["id"] == "mrag"
    assert "polyhead.search.strategies.vote.Vote" in one["code"]
    assert "Multi-Head RAG" in run("papers", "mrag").stdout
    wrong = run("papers", "mragg")
    assert wrong.returncode == 1
    assert "mrag" in wrong.stderr


def test_models():
    models = json.loads(run("models", "--json").stdout)
    assert [m["name"] for m in models if m["default"]] == ["all-MiniLM-L6-v2"]
    assert "gemma-3-270m" in run("models").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search", "/no/such/folder", "what?"), "no such file or folder"),
        (("search", ".", "what?", "--strategy", "magic"), "Unknown strategy 'magic'"),
        (("evaluate", "retrieval", "--data", "nothing"), "No data 'nothing'"),
    ],
)
def test_errors_are_sentences_not_tracebacks(arguments, message):
    result = run(*arguments)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert message in " ".join(result.stderr.split())
