"""The tasks side by side with mteb on the same data and vectors; and mteb runs Polyhead's encoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from mteb import evaluate
from mteb.abstasks.classification import AbsTaskClassification
from mteb.abstasks.clustering import AbsTaskClustering
from mteb.abstasks.clustering_legacy import AbsTaskClusteringLegacy
from mteb.abstasks.pair_classification import AbsTaskPairClassification
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import EncoderProtocol
from mteb.types import PromptType
from sklearn.neighbors import KNeighborsClassifier
from small_tasks import labelled, letters, pairs, reranking, retrieval

from polyhead.evaluate import as_mteb_model
from polyhead.evaluate.classification import measure_classification
from polyhead.evaluate.clustering import measure_clustering
from polyhead.evaluate.metrics import per_query
from polyhead.evaluate.pairs import measure_pairs
from polyhead.evaluate.reranking import measure_reranking, rerank
from polyhead.evaluate.sts import measure_sts

NEAR = 1e-4


def metadata(kind: str, main: str) -> TaskMetadata:
    return TaskMetadata(
        type=kind,
        name=f"Polyhead{kind}",
        description="local",
        reference="https://github.com/polyhead/polyhead",
        dataset={"path": "NA", "revision": "NA"},
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main,
        date=("2026-01-01", "2026-01-01"),
        domains=[],
        task_subtypes=[],
        license="cc-by-4.0",
        annotations_creators="derived",
        dialect=[],
        modalities=["text"],
        sample_creation="found",
        bibtex_citation="",
    )


def mteb_scores(base: type, kind: str, main: str, dataset: Any, encoder: Any = letters, **settings: Any) -> dict:
    """What mteb says of the encoder on a task of local data."""
    task_class = type(f"Local{kind}", (base,), {"metadata": metadata(kind, main), **settings})
    task = task_class()
    task.dataset = dataset
    task.data_loaded = True
    found = evaluate(as_mteb_model(encoder), task, cache=None, co2_tracker=False, show_progress_bar=False)
    return found.task_results[0].scores["test"][0]


def sides(data) -> dict:
    return {"sentence1": [a for a, _ in data.pairs], "sentence2": [b for _, b in data.pairs]}


def check_sts(data, encoder) -> None:
    rows = DatasetDict({"test": Dataset.from_dict({**sides(data), "score": data.gold.tolist()})})
    theirs = mteb_scores(AbsTaskSTS, "STS", "cosine_spearman", rows, encoder)
    ours = measure_sts(data, encoder)
    assert ours["spearman"].value == pytest.approx(theirs["cosine_spearman"], abs=NEAR)
    assert ours["pearson"].value == pytest.approx(theirs["cosine_pearson"], abs=NEAR)


def check_classification(data, encoder, probe: str, samples: int) -> None:
    rows = DatasetDict(
        {
            "train": Dataset.from_dict({"text": data.train, "label": data.train_labels}),
            "test": Dataset.from_dict({"text": data.test, "label": data.test_labels}),
        }
    )
    settings: dict[str, Any] = {"samples_per_label": samples}
    if probe == "knn":
        settings["evaluator_model"] = KNeighborsClassifier(n_neighbors=5, metric="cosine")
    theirs = mteb_scores(AbsTaskClassification, "Classification", "accuracy", rows, encoder, **settings)
    ours = measure_classification(data, encoder, probe=probe, samples=samples)
    assert ours["accuracy"].value == pytest.approx(theirs["accuracy"], abs=NEAR)
    assert ours["f1"].value == pytest.approx(theirs["f1"], abs=NEAR)


def check_clustering(data, encoder, size: int, texts: int | None = None) -> None:
    rows = DatasetDict({"test": Dataset.from_dict({"sentences": data.test, "labels": data.test_labels})})
    settings = {
        "max_fraction_of_documents_to_embed": None,
        "max_documents_per_cluster": size,
        "max_document_to_embed": texts,
    }
    theirs = mteb_scores(AbsTaskClustering, "Clustering", "v_measure", rows, encoder, **settings)
    ours = measure_clustering(data, encoder, size=size, texts=texts)
    assert ours["v_measure"].value == pytest.approx(theirs["v_measure"], abs=NEAR)


def test_sts():
    check_sts(pairs(), letters)


@pytest.mark.parametrize(("probe", "samples"), [("linear", 8), ("knn", 16)])
def test_classification(probe, samples):
    check_classification(labelled(), letters, probe, samples)


@pytest.mark.parametrize("texts", [None, 50])
def test_clustering_bootstrapped(texts):
    check_clustering(labelled(), letters, 200, texts)


def test_clustering_of_one_whole_set():
    data = labelled()
    rows = DatasetDict({"test": Dataset.from_dict({"sentences": [data.test], "labels": [data.test_labels]})})
    theirs = mteb_scores(AbsTaskClusteringLegacy, "Clustering", "v_measure", rows)
    ours = measure_clustering(data, letters, variant="whole")
    assert ours["v_measure"].value == pytest.approx(theirs["v_measure"], abs=NEAR)


def test_pair_classification():
    data = pairs(labels=True)
    table = {**sides(data), "labels": data.gold.astype(int).tolist()}
    rows = DatasetDict({"test": Dataset.from_dict(table)})
    theirs = mteb_scores(AbsTaskPairClassification, "PairClassification", "max_ap", rows)
    ours = measure_pairs(data, letters)
    for metric in ("ap", "accuracy", "f1"):
        assert ours[f"max {metric}"].value == pytest.approx(theirs[f"max_{metric}"], abs=NEAR)
        assert ours[f"cosine {metric}"].value == pytest.approx(theirs[f"cosine_{metric}"], abs=NEAR)


def search_data(corpus: dict, queries: dict, qrels: dict, top_ranked: dict | None) -> dict:
    return {
        "default": {
            "test": {
                "corpus": Dataset.from_list([{"id": k, "title": "", "text": v} for k, v in corpus.items()]),
                "queries": Dataset.from_list([{"id": k, "text": v} for k, v in queries.items()]),
                "relevant_docs": qrels,
                "top_ranked": top_ranked,
            }
        }
    }


def test_reranking():
    data = reranking()
    rows = search_data(data.documents, data.queries, data.qrels, data.candidates)
    theirs = mteb_scores(AbsTaskRetrieval, "Reranking", "map_at_1000", rows)
    ours = measure_reranking(data, letters)
    for ours_name, name in (("map", "map_at_1000"), ("mrr", "mrr_at_1000"), ("ndcg@10", "ndcg_at_10")):
        assert ours[ours_name].value == pytest.approx(theirs[name], abs=NEAR)


def test_retrieval():
    data = retrieval()
    everything = {query: list(data.corpus) for query in data.queries}
    theirs = mteb_scores(
        AbsTaskRetrieval, "Retrieval", "ndcg_at_10", search_data(data.corpus, data.queries, data.qrels, None)
    )
    whole = type(reranking())("toy", data.queries, data.corpus, everything, data.qrels)
    found = per_query(rerank(whole, letters), data.qrels, list(data.queries), ["ndcg@10", "recall@20", "map"])
    for ours, name in (("ndcg@10", "ndcg_at_10"), ("recall@20", "recall_at_20"), ("map", "map_at_1000")):
        assert found[ours].mean() == pytest.approx(theirs[name], abs=NEAR)


class Sides:
    """Says of each text how it was encoded."""

    name = "sides"

    def encode(self, texts):
        return np.array([[1.0, 0.0]] * len(texts))

    def encode_query(self, texts):
        return np.array([[0.0, 1.0]] * len(texts))


def test_the_model_keeps_order_sides_and_says_who_it_is():
    model = as_mteb_model(Sides(), name="mine")
    assert isinstance(model, EncoderProtocol)
    assert model.mteb_model_meta.name == "polyhead/mine"
    options = {"task_metadata": None, "hf_split": "test", "hf_subset": "default"}
    batches = [{"text": ["b", "a"]}, {"text": ["b"]}]
    assert model.encode(batches, prompt_type=PromptType.query, **options).tolist() == [[0.0, 1.0]] * 3
    assert model.encode(batches, prompt_type=PromptType.document, **options).tolist() == [[1.0, 0.0]] * 3
    words = as_mteb_model(letters).encode(batches, **options)
    np.testing.assert_array_equal(words, letters(["b", "a", "b"]))
    a, b = np.array([[3.0, 4.0], [1.0, 0.0]]), np.array([[4.0, 3.0], [0.0, 2.0]])
    np.testing.assert_allclose(model.similarity(a, b).numpy(), [[0.96, 0.8], [0.8, 0.0]], atol=1e-6)
    np.testing.assert_allclose(model.similarity_pairwise(a, b).numpy(), [0.96, 0.0], atol=1e-6)


class Remembering:
    """Encodes each text once with the real model, for mteb and for us."""

    def __init__(self, encoder) -> None:
        self.name, self.encoder, self.known = encoder.name, encoder, {}

    def encode(self, texts):
        new = [text for text in texts if text not in self.known]
        if new:
            self.known |= dict(zip(new, self.encoder.encode(new).dense, strict=True))
        return np.array([self.known[text] for text in texts])


@pytest.mark.real_model
def test_a_real_encoder_on_real_data(minilm_path, data_dir, monkeypatch):
    from polyhead import Encoder
    from polyhead.evaluate.task_data import LabelledTexts, load_labelled, load_pairs

    monkeypatch.setenv("POLYHEAD_DATA", str(data_dir))
    encoder = Remembering(Encoder(minilm_path, backend="torch"))
    check_sts(load_pairs("sts-2015").sample(24), encoder)
    whole = load_labelled("banking77")
    few = sorted(set(whole.test_labels))[:3]
    parts = []
    for texts, labels in ((whole.train, whole.train_labels), (whole.test, whole.test_labels)):
        kept = [(text, few.index(label)) for text, label in zip(texts, labels, strict=True) if label in few]
        parts += [[text for text, _ in kept[::12]], [label for _, label in kept[::12]]]
    data = LabelledTexts("banking", *parts)
    check_classification(data, encoder, "linear", 8)
    check_clustering(data, encoder, 100)
