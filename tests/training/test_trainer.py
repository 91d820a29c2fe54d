"""The trainer: objectives as losses of sentence-transformers, steps, batches, poolers, the folder it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from training_parts import pairs, tiny_encoder

from polyhead import load
from polyhead.embed import Encoder
from polyhead.errors import InputError
from polyhead.objectives import (
    CoSENTLoss,
    CosineSimilarity,
    FalseNegativeMask,
    InfoNCE,
    LargeBatchInfoNCE,
    Metrix,
    Objective,
    TripletLoss,
)
from polyhead.pooling import AttentionPooler
from polyhead.training import ObjectiveLoss, Options, Trainer, examples, held_out, trainable
from polyhead.training.engine import LabelBatches, ShuffledBatches

CPU = {"device": "cpu"}


def features(model: Any, *texts: list[str]) -> list[dict[str, Any]]:
    return [model.preprocess(column) for column in texts]


def gradient(model: Any, value: torch.Tensor) -> torch.Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat([part.ravel() for part in found if part is not None])


@pytest.mark.parametrize("kind", ["pairs", "triplets", "scored", "labelled"])
def test_values_and_gradients_are_those_of_sentence_transformers(encoder: Any, kind: str) -> None:
    anchors, positives, negatives = (["the river", "a bridge", "iron"], ["it runs", "a town", "cost"], ["a", "b", "c"])
    labels = None
    if kind == "scored":
        columns, labels = [anchors, positives], torch.tensor([0.1, 0.9, 0.4])
        ours, theirs = Objective(CoSENTLoss(temperature=0.05)), losses.CoSENTLoss(encoder, scale=20.0)
    elif kind == "labelled":
        columns, labels = [[*anchors, *positives]], torch.tensor([0, 1, 2, 0, 1, 2])
        ours = Objective(TripletLoss(margin=0.3, reduction="nonzero"), CosineSimilarity())
        distance = losses.BatchHardTripletLossDistanceFunction.cosine_distance
        theirs = losses.BatchAllTripletLoss(encoder, distance_metric=distance, margin=0.3)
    else:
        columns = [anchors, positives] + ([negatives] if kind == "triplets" else [])
        ours, theirs = InfoNCE(temperature=0.05), losses.MultipleNegativesRankingLoss(encoder, scale=20.0)
    expected = theirs(features(encoder, *columns), labels)
    found = ObjectiveLoss(encoder, ours)(features(encoder, *columns), labels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient(encoder, found), gradient(encoder, expected), atol=1e-5, rtol=1e-4)


def test_cached_gradients_are_the_same_step() -> None:
    data = [{**row, "negative": "a stone road"} for row in pairs(8)]
    weights = []
    for cached in (None, 3):
        model = tiny_encoder(dropout=0.0)
        options = Options(batch_size=8, steps=2, learning_rate=1e-3, cached=cached, **CPU)
        objective = Objective(InfoNCE(), miners=[FalseNegativeMask(margin=0.1)])
        trainer = Trainer(objective, options=options).fit(model, data)
        weights.append(torch.cat([part.ravel() for part in trainer.model_.state_dict().values()]))
    assert not torch.equal(weights[0], torch.cat([part.ravel() for part in tiny_encoder(0.0).state_dict().values()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-4)


def test_training_learns_and_the_folder_is_plain(encoder_folder: Path, tmp_path: Path) -> None:
    data, seen = pairs(12), []
    options = Options(batch_size=12, epochs=8, learning_rate=1e-3, bf16=True, **CPU)
    trainer = Trainer(LargeBatchInfoNCE(symmetric=True), tmp_path / "out", options)
    before = held_out(examples(data))(trainable(encoder_folder))
    trainer.fit(encoder_folder, data, evaluation=data, progress=lambda done, total: seen.append((done, total)))
    assert trainer.metrics_["accuracy@1"] > before["accuracy@1"] + 0.3
    assert seen[-1] == (8, 8)
    assert any("eval_mrr" in entry for entry in trainer.history_)
    assert all(part.dtype is torch.float32 for part in trainer.model_.parameters())
    plain = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert {type(module).__module__.split(".")[0] for module in plain} == {"sentence_transformers"}
    texts = ["the river", "iron"]
    expected = trainer.model_.encode(texts)
    np.testing.assert_allclose(plain.encode(texts), expected, atol=1e-6)
    np.testing.assert_allclose(Encoder(str(tmp_path / "out"), backend="torch").encode(texts).dense, expected, atol=1e-5)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_poolers_are_trained_and_saved(encoder_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pooler = AttentionPooler(32, heads=4)
    start = {name: value.clone() for name, value in pooler.state_dict().items()}
    options = Options(batch_size=8, steps=2, warmup=0, learning_rate=1e-2, **CPU)
    trainer = Trainer(InfoNCE(), tmp_path / "out", options).fit(encoder_folder, pairs(8), pooling=pooler)
    assert any(not torch.equal(value, start[name]) for name, value in pooler.state_dict().items())
    expected = trainer.model_.encode(["the river"])
    found = SentenceTransformer(str(tmp_path / "out"), trust_remote_code=True, device="cpu").encode(["the river"])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(trainable(tmp_path / "out").encode(["the river"]), expected, atol=1e-6)


def test_one_seed_one_result(encoder_folder: Path) -> None:
    def run(seed: int) -> torch.Tensor:
        options = Options(batch_size=4, steps=1, warmup=0, learning_rate=1e-3, seed=seed, **CPU)
        model = Trainer(InfoNCE(), options=options).fit(encoder_folder, pairs(8)).model_
        return torch.cat([part.ravel() for part in model.state_dict().values()])

    first = run(0)
    assert torch.equal(first, run(0))
    assert not torch.equal(first, run(1))


def test_models_of_every_kind(encoder_folder: Path, encoder: Any) -> None:
    texts = ["the river", "a bridge of iron"]
    expected = encoder.encode(texts)
    kinds: list[Any] = [
        str(encoder_folder),
        Encoder(str(encoder_folder), backend="torch"),
        load(str(encoder_folder)),
        encoder,
    ]
    for model in kinds:
        found = trainable(model, device="cpu")
        np.testing.assert_allclose(found.encode(texts), expected, atol=1e-6)
    assert trainable(encoder) is encoder
    assert trainable(encoder_folder, max_tokens=8).max_seq_length == 8
    cls = trainable(Encoder(str(encoder_folder), backend="torch", pooling="cls"))
    np.testing.assert_allclose(cls.encode(texts), trainable(encoder_folder, "cls").encode(texts), atol=1e-6)
    assert not np.allclose(cls.encode(texts), expected)
    with pytest.raises(InputError, match="without files"):
        trainable(load(encoder[0].auto_model))
    with pytest.raises(InputError, match="max_tokens = 99"):
        trainable(encoder_folder, max_tokens=99)


def test_batches_use_every_row_once_in_an_order_of_seed_and_epoch() -> None:
    labels = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
    data = examples([{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]).dataset()
    for kind in (ShuffledBatches, LabelBatches):
        sampler = kind(data, batch_size=4, drop_last=False, seed=1)
        orders = []
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert sorted(row for batch in batches for row in batch) == list(range(10))
            assert len(batches) == len(sampler) == 3
            assert batches == list(sampler)
            orders.append(batches)
            if kind is LabelBatches:
                for batch in batches[:2]:
                    counts = np.bincount([labels[row] for row in batch])
                    assert all(count in (0, 2, 4) for count in counts)
        assert orders[0] != orders[1]


def test_what_does_not_go_together_is_said(encoder: Any, tmp_path: Path) -> None:
    options = Options(batch_size=4, **CPU)
    labelled = [{"text": f"a {i}", "label": i % 2} for i in range(4)]
    scored = [{"anchor": "a", "positive": "b", "score": 1.0}]
    wrong: list[tuple[Any, Any, str]] = [
        (InfoNCE(), ["a", "b"], "add a label column"),
        (LargeBatchInfoNCE(), labelled, "learns from pairs"),
        (LargeBatchInfoNCE(), scored, "does not take scores"),
        (Metrix(Objective(InfoNCE())), pairs(4), "learns from labels"),
        ("infonce", pairs(4), "expected an Objective"),
        (losses.CoSENTLoss(tiny_encoder()), pairs(4), "made with another model"),
    ]
    for objective, data, said in wrong:
        with pytest.raises(InputError, match=said):
            Trainer(objective, options=options).fit(encoder, data)
    one = [{"text": "a", "label": 1}, {"text": "b", "label": 1}]
    with pytest.raises(InputError, match="one label"):
        Trainer(InfoNCE(), options=options).fit(encoder, one)
    with pytest.raises(InputError, match="batches by label need labels"):
        Trainer(InfoNCE(), options=Options(batches="by-label", **CPU)).fit(encoder, pairs(4))
    for name, value in (("batch_size", 0), ("steps", 0), ("batches", "any"), ("learning_rate", -1.0)):
        with pytest.raises(InputError, match=name):
            Options(**{name: value})
    with pytest.raises(InputError, match="larger batch_size"):
        Options(cached=2, more={"gradient_accumulation_steps": 2})


def test_held_out_measures(encoder: Any) -> None:
    """Against the definitions, with the model's own vectors."""
    rows = [{**row, "negative": "stone road"} for row in pairs(6)]
    vectors = {text: encoder.encode(text) for row in rows for text in row.values()}
    ranks = []
    for row in rows:
        others = {text for each in rows for text in (each["positive"], each["negative"])}
        own = vectors[row["anchor"]] @ vectors[row["positive"]]
        ranks.append(1 + sum(vectors[row["anchor"]] @ vectors[text] > own + 1e-6 for text in others))
    found = held_out(examples(rows))(encoder)
    assert found["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert found["accuracy@1"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    labelled = examples([{"text": text, "label": i % 2} for i, text in enumerate(vectors)])
    every = np.stack(list(vectors.values()))
    similarity = every @ every.T - 9 * np.eye(len(every))
    expected = np.mean([(i - j) % 2 == 0 for i, j in enumerate(similarity.argmax(1))])
    assert held_out(labelled)(encoder)["1nn accuracy"] == pytest.approx(expected)
