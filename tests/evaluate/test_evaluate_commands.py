"""The commands of the tasks: a file of the user's own, several models, a table or JSON."""

from __future__ import annotations

import csv
import json

import pytest
from search.fake_encoder import FakeEncoder
from small_tasks import coarse, labelled, letters, pairs, reranking, retrieval
from typer.testing import CliRunner

from polyhead.cli import evaluate as commands
from polyhead.evaluate import measured
from polyhead.evaluate.models import evaluate_models


@pytest.fixture
def run(monkeypatch):
    def encoders(model, backend):
        return {name: {"letters": letters, "coarse": coarse}[name] for name in model}

    monkeypatch.setattr(commands, "_encoders", encoders)
    monkeypatch.setattr(measured, "RESAMPLES", 100)  # the command is tested here, not its statistics
    return lambda *arguments: CliRunner().invoke(commands.app, list(arguments), env={"COLUMNS": "100"})


@pytest.fixture
def files(tmp_path):
    def table(name, header, rows):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
        return str(tmp_path / name)

    scored, marked, texts, ranked = pairs(40), pairs(40, labels=True), labelled(), reranking()
    rows = [(text, label, "train") for text, label in zip(texts.train, texts.train_labels, strict=True)]
    rows += [(text, label, "test") for text, label in zip(texts.test, texts.test_labels, strict=True)]
    lines = []
    for query, text in ranked.queries.items():
        sides = {1: [], 0: []}
        for name, grade in ranked.qrels[query].items():
            sides[grade].append(ranked.documents[name])
        lines.append(json.dumps({"query": text, "positive": sides[1], "negative": sides[0]}))
    (tmp_path / "ranked.jsonl").write_text("\n".join(lines))
    of = [(*pair, gold) for pair, gold in zip(scored.pairs, scored.gold, strict=True)]
    marks = [(*pair, int(gold)) for pair, gold in zip(marked.pairs, marked.gold, strict=True)]
    return {
        "sts": table("sts.csv", ["sentence1", "sentence2", "score"], of),
        "pairs": table("pairs.csv", ["sentence1", "sentence2", "label"], marks),
        "classification": table("texts.csv", ["text", "label", "split"], rows),
        "reranking": str(tmp_path / "ranked.jsonl"),
    }


def test_every_task_prints_json_with_the_tests_of_two_models(run, files):
    for task, file in files.items():
        found = run(task, "--data", file, "--model", "letters", "--model", "coarse", "--json")
        assert found.exit_code == 0, found.output
        report = json.loads(found.stdout)
        assert list(report["results"]) == ["letters", "coarse"]
        assert report["meta"]["task"] == task
        assert {row["metric"] for row in report["comparisons"]} == set(report["results"]["letters"])


def test_options_reach_the_task_and_the_table_is_for_people(run, files, tmp_path):
    out = tmp_path / "out.json"
    shown = run(
        *("classification", "--data", files["classification"], "--model", "letters", "--model", "coarse"),
        *("--probe", "knn", "--samples", "4", "--limit", "30", "--out", str(out)),
    )
    assert "accuracy" in shown.stdout
    assert "Holm" in shown.stdout
    meta = json.loads(out.read_text())["meta"]
    assert meta["options"] == {"probe": "knn", "samples": 4}
    assert meta["card"]["test"] == meta["limit"] == 30
    clusters = run(
        "clustering", "--data", files["classification"], "--model", "letters", "--variant", "whole", "--json"
    )
    assert 0 < json.loads(clusters.stdout)["results"]["letters"]["v_measure"]["value"] < 1


def test_embedders_are_compared_with_what_might_explain_them(run, tmp_path):
    data = retrieval()
    files = {"corpus": data.corpus, "queries": data.queries}
    for name, texts in files.items():
        lines = [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    judged = [(q, d, grade) for q, grades in data.qrels.items() for d, grade in grades.items()]
    lines = [json.dumps({"query-id": q, "corpus-id": d, "score": grade}) for q, d, grade in judged]
    (tmp_path / "qrels.jsonl").write_text("\n".join(lines))
    options = ("--data", str(tmp_path), "--k", "3", "--model", "letters", "--model", "coarse")
    report = json.loads(run("embedders", *options, "--json").stdout)
    assert set(report["results"]["letters"]) == {"accuracy@1", "accuracy@3"}
    assert set(report["facts"]) == {"letters", "coarse"}
    shown = run("embedders", *options).stdout
    assert "isoscore" in shown
    assert "accuracy@3" in shown


def test_several_models_on_retrieval_are_rows_of_one_corrected_table():
    models = {"good": FakeEncoder(seed=0), "short": FakeEncoder(seed=1, words=1)}
    report = evaluate_models(retrieval(), models)
    assert list(report.results) == ["good", "short"]
    assert {(c.a, c.b, c.metric) for c in report.comparisons} == {
        ("good", "short", "ndcg@10"),
        ("good", "short", "recall@20"),
    }
    assert report.meta["models"] == {name: one.fingerprint for name, one in models.items()}
    both = evaluate_models(retrieval(), {"good": models["good"]}, strategies=["dense", "aspects"])
    assert list(both.results) == ["good · dense", "good · aspects"]
    assert both.results["good · dense"] == report.results["good"]
