"""The main job from the command line, with the real model on real files."""

from __future__ import annotations

import json

import pytest
from test_cli import run

pytestmark = pytest.mark.real_model

TEXTS = {
    "rome.md": "# Rome\n\nThe city of Rome was founded on the Tiber. Its first emperor was Augustus.",
    "bread.txt": "Sourdough bread rises slowly; the oven should be at 230 degrees before the loaf goes in.",
    "cats.html": "<title>Cats</title><p>Cats sleep most of the day and hunt mice.</p>",
    "engine.csv": "text,part\nA diesel engine ignites its fuel by compression.,motor\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, minilm_path):
    folder = tmp_path_factory.mktemp("documents")
    for name, text in TEXTS.items():
        (folder / name).write_text(text)
    (folder / "broken.pdf").write_text("this is no pdf")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def test_search_indexes_answers_and_updates(folder):
    found = run("search", str(folder), "who was the first emperor, and how hot must the oven be?", "--json", "-k", "2")
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert {hit["path"] for hit in result["hits"]} == {"rome.md", "bread.txt"}
    by_path = {hit["path"]: hit for hit in result["hits"]}
    assert "emperor" in by_path["rome.md"]["answers"]
    assert "oven" in by_path["bread.txt"]["answers"]
    assert len(by_path["rome.md"]["heads"]) == 3
    assert result["update"]["added"] == 4
    assert any("broken.pdf" in problem for problem in result["update"]["problems"])
    assert result["update"]["skipped"] == {".png": 1}

    (folder / "cats.html").write_text("<p>Dogs bark at the postman.</p>")
    (folder / "engine.csv").unlink()
    again = json.loads(run("search", str(folder), "barking at the mail", "--json", "-k", "1").stdout)
    assert (again["update"]["changed"], again["update"]["removed"], again["update"]["unchanged"]) == (1, 1, 2)
    assert again["hits"][0]["path"] == "cats.html"

    shown = run("search", str(folder), "barking at the mail", "--explain", "-k", "1").stdout
    assert "cats.html" in shown
    assert "How it was decided" in shown
    assert "exact scan" in shown

    filtered = json.loads(run("search", str(folder), "barking", "--json", "--where", "kind = 'md'").stdout)
    assert [hit["path"] for hit in filtered["hits"]] == ["rome.md"]
    wrong = run("search", str(folder), "barking", "--where", "colour = 'red'")
    assert wrong.returncode == 1
    assert "colour" in wrong.stderr


def test_unchanged_index_loads_no_model(folder):
    run("index", str(folder))
    quiet = json.loads(run("index", str(folder), "--json", PYTHONPROFILEIMPORTTIME="").stdout)
    assert (quiet["added"], quiet["changed"], quiet["chunks"]) == (0, 0, 0)
    timed = run("index", str(folder), PYTHONPROFILEIMPORTTIME="1").stderr
    assert " torch\n" not in timed
    assert " transformers\n" not in timed


def test_another_model_is_refused_with_the_way_out(folder):
    wrong = run("search", str(folder), "barking", "--model", "gemma-3-270m")
    assert wrong.returncode == 1
    assert "--rebuild" in wrong.stderr
