"""Metrics by hand and against ir-measures; the report's schema, groups and files."""

from __future__ import annotations

import io
import json
import math

import ir_measures
import numpy as np
import pytest

from polyhead.errors import InputError
from polyhead.evaluate.datasets import RetrievalData
from polyhead.evaluate.metrics import distinct_scores, per_query
from polyhead.evaluate.retrieval import RetrievalReport, evaluate_runs, read_trec_run, write_trec_run

QRELS = {"q1": {"a": 1, "b": 1, "z": 0}, "q2": {"c": 1}}
RUN = {"q1": [("a", 0.9), ("x", 0.8), ("b", 0.8)], "q2": [("x", 0.3), ("c", 0.3)]}


def data() -> RetrievalData:
    return RetrievalData(
        "toy", dict.fromkeys("abcxz", "text"), {"q1": "?", "q2": "?"}, QRELS, {"aspects": {"q1": 2, "q2": 1}}
    )


def test_metrics_by_hand():
    found = per_query(RUN, QRELS, ["q1", "q2"], ["recall@2", "ndcg@10", "mrr", "map", "precision@2", "success@1"])
    assert found["recall@2"].tolist() == [0.5, 1.0]
    assert found["precision@2"].tolist() == [0.5, 0.5]
    assert found["success@1"].tolist() == [1.0, 0.0]
    assert found["mrr"].tolist() == [1.0, 0.5]
    assert found["map"] == pytest.approx([(1 + 2 / 3) / 2, 0.5])
    ideal = 1 + 1 / math.log2(3)
    assert found["ndcg@10"] == pytest.approx([(1 + 1 / math.log2(4)) / ideal, 1 / math.log2(3)])


def test_ties_keep_the_order_given():
    tied = {"q2": [("x", 1.0), ("c", 1.0)]}
    flipped = {"q2": [("c", 1.0), ("x", 1.0)]}
    assert per_query(tied, QRELS, ["q2"], ["mrr"])["mrr"].tolist() == [0.5]
    assert per_query(flipped, QRELS, ["q2"], ["mrr"])["mrr"].tolist() == [1.0]


def test_values_equal_ir_measures_on_random_runs():
    generator = np.random.default_rng(0)
    documents = [f"d{i}" for i in range(50)]
    qrels = {f"q{i}": {d: int(generator.random() < 0.2) for d in documents} for i in range(20)}
    for judged in qrels.values():
        judged["d0"] = 1
    run = {q: [(documents[i], float(-r)) for r, i in enumerate(generator.permutation(50)[:30])] for q in qrels}
    ours = per_query(run, qrels, list(qrels), ["ndcg@10", "recall@20"])
    lines = "\n".join(f"{q} Q0 {d} {r + 1} {s} t" for q, ranking in run.items() for r, (d, s) in enumerate(ranking))
    theirs = ir_measures.calc_aggregate(
        [ir_measures.nDCG @ 10, ir_measures.R @ 20], qrels, ir_measures.read_trec_run(io.StringIO(lines))
    )
    assert ours["ndcg@10"].mean() == pytest.approx(theirs[ir_measures.nDCG @ 10])
    assert ours["recall@20"].mean() == pytest.approx(theirs[ir_measures.R @ 20])


def test_a_missing_ranking_counts_as_zero():
    assert per_query({"q1": RUN["q1"]}, QRELS, ["q1", "q2"], ["recall@10"])["recall@10"].tolist() == [1.0, 0.0]


def test_report_schema_groups_and_round_trip(tmp_path):
    worse = {"q1": [("x", 1.0)], "q2": [("x", 1.0), ("c", 0.5)]}
    report = evaluate_runs(data(), {"good": RUN, "bad": worse}, metrics=["recall@20", "ndcg@10"], meta={"model": "m"})
    plain = json.loads(json.dumps(report.to_json()))
    assert set(plain["results"]["good"]["recall@20[aspects>=2]"]) == {"value", "low", "high", "n"}
    assert plain["results"]["good"]["recall@20[aspects>=2]"]["n"] == 1
    assert plain["results"]["bad"]["recall@20[aspects=1]"]["value"] == 1.0
    assert {c["metric"] for c in plain["comparisons"]} >= {"recall@20", "ndcg@10[aspects=1]"}
    first = next(c for c in plain["comparisons"] if c["metric"] == "recall@20")
    assert (first["a"], first["b"], first["difference"]) == ("good", "bad", 0.5)
    report.save(tmp_path / "r.json")
    assert RetrievalReport.load(tmp_path / "r.json") == report


def test_table_shows_every_strategy_and_metric():
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    console.print(evaluate_runs(data(), {"good": RUN, "bad": RUN}).table())
    shown = console.export_text()
    assert "good" in shown
    assert "bad" in shown
    assert "recall@20[aspects>=2]" in shown
    assert "…" not in shown


def test_trec_run_round_trip(tmp_path):
    write_trec_run(RUN, tmp_path / "run.txt")
    lines = (tmp_path / "run.txt").read_text().splitlines()
    assert lines[0].split()[:4] == ["q1", "Q0", "a", "1"]
    back = read_trec_run(tmp_path / "run.txt")
    assert {q: [d for d, _ in r] for q, r in back.items()} == {q: [d for d, _ in r] for q, r in RUN.items()}
    assert len({s for _, s in back["q1"]}) == 3
    with pytest.raises(InputError, match="white space"):
        write_trec_run({"q": [("two words", 1.0)]}, tmp_path / "bad.txt")
    (tmp_path / "bad.txt").write_text("q Q0 d 1\n")
    with pytest.raises(InputError, match="line 1"):
        read_trec_run(tmp_path / "bad.txt")


def test_errors_name_what_is_expected():
    with pytest.raises(InputError, match="Unknown metric 'foo@3'"):
        per_query(RUN, QRELS, ["q1"], ["foo@3"])
    with pytest.raises(InputError, match="no relevant document"):
        per_query(RUN, {"q3": {"a": 0}}, ["q3"], ["mrr"])
    with pytest.raises(InputError, match="no run"):
        evaluate_runs(data(), {})
    assert distinct_scores([("a", 0.5), ("b", 0.5)]) == {"a": 2.0, "b": 1.0}
