"""Tasks against their definitions, their data from files, and comparisons of several encoders."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, f1_score, v_measure_score
from small_tasks import coarse, labelled, letters, pairs, reranking, retrieval
from statsmodels.stats.multitest import multipletests

from polyhead.errors import InputError
from polyhead.evaluate import evaluate_task
from polyhead.evaluate.classification import few_of_each, macro_f1, measure_classification
from polyhead.evaluate.clustering import measure_clustering, v_measure
from polyhead.evaluate.measured import Measured, compare
from polyhead.evaluate.pairs import average_precision, best_accuracy, best_f1, best_threshold
from polyhead.evaluate.report import Report
from polyhead.evaluate.statistics import bootstrap_of, holm, shifted_bootstrap
from polyhead.evaluate.sts import correlations, measure_sts, spearman
from polyhead.evaluate.task_data import candidates_of, load_labelled, load_pairs, load_reranking
from polyhead.evaluate.tasks import named
from polyhead.evaluate.vectors import paired_cosine, vectors


def test_holm_equals_statsmodels():
    generator = np.random.default_rng(0)
    for n in (1, 2, 7, 30):
        p = generator.random(n) ** 3
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1].tolist(), abs=1e-12)


def test_metrics_by_scikit_learn_on_ties_too():
    generator = np.random.default_rng(1)
    for trial in range(20):
        labels = generator.integers(0, 2, 40)
        scores = generator.integers(0, 3 + 4 * trial, 40).astype(float)
        assert average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores))
        cuts = (np.unique(scores)[1:] + np.unique(scores)[:-1]) / 2
        accuracies = [((scores > cut) == labels).mean() for cut in cuts]
        assert best_accuracy(scores, labels) == pytest.approx(max(accuracies))
        assert best_f1(scores, labels) == pytest.approx(max(f1_score(labels, scores > cut) for cut in cuts))
        chosen = best_threshold(scores, labels)
        assert ((scores > chosen) == labels).mean() == pytest.approx(max(accuracies))
        gold, guessed = generator.integers(0, 5, 30), generator.integers(0, 5, 30)
        assert macro_f1(gold, guessed, 6) == pytest.approx(f1_score(gold, guessed, average="macro"))
        table = np.histogram2d(gold, guessed, bins=(5, 5), range=((0, 5), (0, 5)))[0]
        assert v_measure(table) == pytest.approx(v_measure_score(gold, guessed))
        assert spearman(gold, guessed) == pytest.approx(stats.spearmanr(gold, guessed).statistic)
    assert best_accuracy(np.ones(4), np.array([0, 1, 0, 1])) == 0.0
    with pytest.raises(InputError, match="equal"):
        best_threshold(np.ones(4), np.array([0, 1, 0, 1]))


def test_groups_are_averaged_and_resamples_keep_pairs_together():
    data = pairs()
    cosine = np.random.default_rng(0).random(len(data))
    found = correlations(cosine, data)
    number = np.array(data.group)
    each = [stats.spearmanr(cosine[number == g], data.gold[number == g]).statistic for g in ("a", "b")]
    assert found["spearman[mean of groups]"].value == pytest.approx(np.mean(each))
    rows = np.array([3, 3, 10, 20, 21, 40])
    assert found["pearson"].of(rows) == pytest.approx(stats.pearsonr(cosine[rows], data.gold[rows]).statistic)


def test_few_of_each_are_that_few_and_differ_between_draws():
    labels = ["a"] * 20 + ["b"] * 3 + ["c"] * 9
    draws = few_of_each(labels, 4, 3)
    for rows in draws:
        assert sorted(labels[row] for row in rows) == ["a"] * 4 + ["b"] * 3 + ["c"] * 4
    assert len({tuple(sorted(rows)) for rows in draws}) == 3


def test_accuracy_has_a_value_a_text_and_the_interval_is_of_the_texts():
    found = measure_classification(labelled(), letters, experiments=4)
    values = found["accuracy"].values
    assert values.shape == (90,)
    assert set(np.unique(values)) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert found["accuracy"].interval().low < found["accuracy"].value < found["accuracy"].interval().high


def test_clusters_of_resampled_texts_weigh_each_text_by_how_often_it_was_drawn():
    data = labelled()
    found = measure_clustering(data, letters, variant="whole")["v_measure"]
    from sklearn.cluster import MiniBatchKMeans

    assigned = MiniBatchKMeans(4, batch_size=500, n_init="auto", random_state=42).fit_predict(letters(data.test))
    rows = np.random.default_rng(0).integers(0, 90, 90)
    expected = v_measure_score(np.array(data.test_labels)[rows], assigned[rows])
    assert found.of(rows) == pytest.approx(expected)


def test_shifted_bootstrap_is_near_the_permutation_test_for_a_mean():
    generator = np.random.default_rng(5)
    a = generator.normal(0, 1, 60)
    b = a + generator.normal(0.12, 0.5, 60)
    difference = a - b
    draws = np.array([difference[generator.integers(0, 60, 60)].mean() for _ in range(4000)])
    assert shifted_bootstrap(draws, difference.mean()) == pytest.approx(
        stats.ttest_1samp(difference, 0).pvalue, abs=0.03
    )
    assert shifted_bootstrap(np.zeros(99), 0.0) == 1.0


def test_a_test_of_equal_encoders_rejects_about_as_rarely_as_it_says():
    rejected = 0
    for trial in range(200):
        generator = np.random.default_rng(trial)
        difference = generator.normal(size=60)
        draws = difference[generator.integers(0, 60, (400, 60))].mean(1)
        rejected += shifted_bootstrap(draws, difference.mean()) < 0.05
    assert 2 <= rejected <= 22


def test_every_comparison_of_a_report_is_paired_and_corrected_over_all_of_them():
    data = pairs()
    report = evaluate_task("sts", data, {"letters": letters, "coarse": coarse, "again": letters})
    assert [(c.a, c.b) for c in report.comparisons] == [("letters", "coarse")] * 3 + [("letters", "again")] * 3
    assert [c.p_holm for c in report.comparisons] == pytest.approx(holm([c.p for c in report.comparisons]))
    better = report.comparisons[0]
    assert better.metric == "spearman"
    assert better.difference > 0
    assert better.p < 0.05
    for same in report.comparisons[3:]:
        assert (same.difference, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    ours, theirs = measure_sts(data, letters)["spearman"], measure_sts(data, coarse)["spearman"]
    alone, shown = bootstrap_of(ours.of, ours.n), report.results["letters"]["spearman"]
    assert (shown.value, shown.low, shown.high) == pytest.approx((alone.value, alone.low, alone.high))
    paired = bootstrap_of(lambda rows: ours.of(rows) - theirs.of(rows), ours.n)
    assert (better.low, better.high) == pytest.approx((paired.low, paired.high))
    again = Report.from_json(json.loads(json.dumps(report.to_json())))
    assert again.comparisons == report.comparisons
    assert "shifted" in again.meta["tests"]
    assert "*" not in str(evaluate_task("sts", data, [letters]).table().caption)


@pytest.mark.parametrize(
    ("task", "data", "metric"),
    [
        ("classification", labelled(), "accuracy"),
        ("clustering", labelled(), "v_measure"),
        ("pairs", pairs(labels=True), "max ap"),
        ("reranking", reranking(), "map"),
    ],
)
def test_the_better_encoder_is_better_in_every_task(task, data, metric, monkeypatch):
    monkeypatch.setattr("polyhead.evaluate.measured.RESAMPLES", 100)
    options = {"size": 200, "experiments": 3} if task == "clustering" else {}
    report = evaluate_task(task, data, {"good": letters, "coarse": coarse}, **options)
    good, poor = (report.results[name][metric] for name in ("good", "coarse"))
    assert good.value > poor.value
    assert good.low <= good.value <= good.high
    assert any(c.metric == metric for c in report.comparisons)


def test_files_of_the_users_own(tmp_path):
    (tmp_path / "sts.csv").write_text('sentence1,sentence2,score\n"a, b",c,3.5\nd,e,1\nf,g,2\n')
    found = load_pairs(str(tmp_path / "sts.csv"))
    assert found.pairs[0] == ("a, b", "c")
    assert found.gold.tolist() == [3.5, 1.0, 2.0]
    (tmp_path / "pairs.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": 1}\n')
    assert load_pairs(str(tmp_path / "pairs.jsonl"), labels=True).gold.tolist() == [1.0]
    rows = [{"text": f"t{i}", "label": i % 2, "split": "train" if i < 6 else "test"} for i in range(8)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_labelled(str(tmp_path / "texts.jsonl"))
    assert (len(data.train), data.test, data.test_labels) == (6, ["t6", "t7"], [0, 1])
    (tmp_path / "whole.tsv").write_text("text\tlabel\n" + "".join(f"t{i}\t{i % 2}\n" for i in range(20)))
    assert load_labelled(str(tmp_path / "whole.tsv")).card == {"train": 15, "test": 5, "test_texts_also_in_train": 0}
    lines = [
        {"query": "q", "positive": ["a"], "negative": ["b", "c"]},
        {"query": "r", "positive": [], "negative": ["b"]},
    ]
    (tmp_path / "rank.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ranked = load_reranking(str(tmp_path / "rank.jsonl"))
    assert ranked.qrels == {"0": {"0-+0": 1, "0--0": 0, "0--1": 0}}
    assert ranked.card["lines_without_positive_or_negative"] == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "sentence1,sentence2\na,b\n", "no score"),
        ("x.csv", "sentence1,sentence2,score\na,b,high\n", "numbers only"),
        ("x.jsonl", "{oops\n", "not JSON"),
        ("x.csv", "", "no rows"),
        ("x.txt", "a\n", "expected .csv"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_pairs(str(tmp_path / name))


def test_what_cannot_be_measured_says_why(tmp_path):
    with pytest.raises(InputError, match="neither a known name"):
        load_pairs("nowhere")
    with pytest.raises(InputError, match="No task"):
        evaluate_task("stz", pairs(), [letters])
    with pytest.raises(InputError, match="at least one"):
        evaluate_task("sts", pairs(), [])
    with pytest.raises(InputError, match="limit"):
        evaluate_task("sts", pairs(), [letters], limit=1)
    with pytest.raises(InputError, match="probe"):
        measure_classification(labelled(), letters, probe="forest")
    with pytest.raises(InputError, match="variant"):
        measure_clustering(labelled(), letters, variant="fast")
    with pytest.raises(InputError, match="same examples"):
        compare({"a": {"m": Measured.mean([1.0])}, "b": {"m": Measured.mean([1.0, 0.0])}})
    with pytest.raises(InputError, match="does not encode"):
        vectors(3, ["a"])
    with pytest.raises(InputError, match="expected"):
        vectors(lambda texts: np.ones(len(texts)), ["a"])
    with pytest.raises(InputError, match="not numbers"):
        vectors(lambda texts: np.full((len(texts), 2), np.nan), ["a"])
    (tmp_path / "l.csv").write_text("sentence1,sentence2,label\na,b,2\n")
    with pytest.raises(InputError, match="0 or 1"):
        load_pairs(str(tmp_path / "l.csv"), labels=True)


def test_limits_are_drawn_counted_and_kept_in_order():
    few = labelled().limited(10, seed=3)
    assert len(few.test) == len(few.test_labels) == 10
    assert few.card["test_left_out"] == 80
    places = [labelled().test.index(text) for text in few.test]
    assert places == sorted(places)
    ranked = reranking().limited(4)
    assert len(ranked.queries) == len(ranked.qrels) == len(ranked.candidates) == 4
    assert set(ranked.documents) == {name for some in ranked.candidates.values() for name in some}


def test_candidates_hold_all_relevant_documents_and_as_many_as_asked():
    data = retrieval()
    found = candidates_of(data, 20, seed=1)
    for query, names in found.candidates.items():
        assert set(data.qrels[query]) <= set(names)
        assert len(names) == len(set(names)) == max(20, len(data.qrels[query]) + 1)
    assert candidates_of(data, 20, seed=1) == found
    assert candidates_of(data, 20, seed=2).candidates != found.candidates


def test_names_and_vectors_of_encoders():
    assert list(named([letters, coarse, letters])) == ["letters", "coarse", "letters (2)"]
    asked = []

    def once(texts):
        asked.extend(texts)
        return letters(texts)

    np.testing.assert_array_equal(vectors(once, ["b", "a", "b"]), letters(["b", "a", "b"]))
    assert asked == ["b", "a"]
    assert paired_cosine(np.array([[0.0, 0.0]]), np.array([[1.0, 0.0]])).tolist() == [0.0]
