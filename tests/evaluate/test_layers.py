"""Layer curves and head maps against measures taken from the model by hand."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from small_tasks import pairs
from tiny import tiny

import polyhead
from polyhead.errors import InputError
from polyhead.evaluate.geometry import curvature, dime, effective_rank, lidar, matrix_entropy
from polyhead.evaluate.layers import (
    METRICS,
    LayerCurve,
    drop_words,
    head_geometry,
    layer_metrics,
    layer_sweep,
    layer_vectors,
)
from polyhead.evaluate.sts import measure_sts

TEXTS = ["the card was lost today", "a refund please", "what is the rate of the euro today my friend", "no no no no"]


class Words:
    """A tokenizer: a word is a token; padded on the right."""

    def __call__(self, texts, *, max_length, truncation, padding, return_tensors):
        rows = [[zlib.crc32(word.encode()) % 90 + 3 for word in text.split()][:max_length] for text in texts]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", params=["bert", "gemma3"])
def model(request):
    loaded = polyhead.load(tiny(request.param))
    loaded.__dict__["tokenizer"] = Words()
    return loaded


@pytest.fixture(scope="module")
def alone(model):
    """Token states ``[places, tokens, hidden]`` and head outputs of each text on its own, without padding."""
    states, heads = [], []
    for text in TEXTS:
        inputs = model.tokenize([text], truncation=True, max_length=128)
        with torch.no_grad(), model.record("heads") as recording:
            outputs = model.module(**inputs, output_hidden_states=True)
        states.append(torch.stack(outputs.hidden_states)[:, 0].double().numpy())
        heads.append(recording.heads[0].double().numpy())
    return states, heads


def test_vectors_are_means_over_real_tokens_and_end_with_what_the_model_gives(model, alone):
    found, states = layer_vectors(model, TEXTS, batch=3, tokens=True)
    assert found.shape == (4, model.layers + 1, 32)
    for row, (ours, theirs) in enumerate(zip(states, alone[0], strict=True)):
        np.testing.assert_allclose(found[row], theirs.mean(1), atol=1e-5)
        np.testing.assert_allclose(np.stack(ours), theirs, atol=1e-5)
    cut, _ = layer_vectors(model, TEXTS[2:3], max_tokens=3)
    assert np.abs(cut - found[2:3]).max() > 1e-3


def test_every_metric_by_the_states_of_each_text(model, alone):
    found = layer_metrics(model, TEXTS, views=3, seed=5)
    assert list(found) == list(METRICS)
    for name, measure in (
        ("prompt entropy", matrix_entropy),
        ("curvature", curvature),
        ("prompt effective rank", effective_rank),
    ):
        ours = found[name].texts
        each = np.array([[measure(place) for place in states] for states in alone[0][:3]])
        np.testing.assert_allclose(ours[:3], each, atol=1e-4)
        expected = [np.mean([value for value in column if not np.isnan(value)]) for column in ours.T]
        np.testing.assert_allclose(found[name].values, expected)
    if model.config.model_type.startswith("gemma"):  # no positions are added to the words: "no no no no" stands still
        assert np.isnan(found["curvature"].texts[3, 0])
        assert found["curvature"].to_json()["intervals"][0]["n"] == 3
    pooled = np.stack([states.mean(1) for states in alone[0]])
    expected = [effective_rank(pooled[:, place]) for place in range(model.layers + 1)]
    np.testing.assert_allclose(found["effective rank"].values, expected, atol=1e-4)
    views = np.stack([layer_vectors(model, drop_words(TEXTS, seed=5 + i))[0] for i in range(3)], axis=1)
    np.testing.assert_allclose(
        found["lidar"].values, [lidar(views[:, :, p]) for p in range(model.layers + 1)], rtol=1e-5
    )
    np.testing.assert_allclose(found["dime"].values[1], dime(views[:, 0, 1], views[:, 1, 1]), rtol=1e-5)


def test_a_map_of_heads_is_of_their_pooled_outputs(model, alone):
    found = head_geometry(model, TEXTS, effective_rank)
    assert found.shape == (2, 4)
    pooled = np.stack([heads.mean(2) for heads in alone[1]])
    assert found.values[1, 2] == pytest.approx(effective_rank(pooled[:, 1, 2]), abs=1e-4)
    assert found.name == "effective_rank"


def test_a_sweep_measures_each_layer_and_tests_it_against_the_last(model, monkeypatch):
    monkeypatch.setattr("polyhead.evaluate.measured.RESAMPLES", 100)
    data = pairs(20)
    texts = [text for pair in data.pairs for text in pair]
    found = layer_sweep(model, {"sts": lambda encode: measure_sts(data, encode)["spearman"]}, texts)["sts"]
    vectors, _ = layer_vectors(model, texts)
    rows = {text: number for number, text in enumerate(texts)}
    for place in range(model.layers + 1):
        at = measure_sts(data, lambda some, place=place: np.array([vectors[rows[text], place] for text in some]))
        assert found.curve.values[place] == pytest.approx(at["spearman"].value, abs=1e-6)
    assert [(c.a, c.b) for c in found.report.comparisons] == [("last", str(place)) for place in range(model.layers)]
    assert found.report.results["last"]["sts"].value == pytest.approx(found.curve.values[-1])
    with pytest.raises(InputError, match="not among those encoded"):
        layer_sweep(model, {"sts": lambda encode: measure_sts(data, encode)["spearman"]}, texts[:3])


def test_curves_choose_correlate_and_carry_intervals():
    each = np.array([[1.0, 3.0, 2.0], [2.0, 5.0, 2.0], [0.0, 4.0, 2.0]])
    curve = LayerCurve(each.mean(0), "x", texts=each)
    assert (curve.best(), curve.best(lowest=True)) == (1, 0)
    assert curve.rank_correlation(LayerCurve(np.array([5.0, 1.0, 2.0]), "y")) == pytest.approx(-1.0)
    plain = curve.to_json()
    assert plain["values"] == [1.0, 4.0, 2.0]
    assert plain["intervals"][2] == {"value": 2.0, "low": 2.0, "high": 2.0, "n": 3}
    with pytest.raises(InputError, match="3 and 2 places"):
        curve.rank_correlation(LayerCurve(np.zeros(2), "z"))


def test_views_leave_out_words_and_never_all():
    views = drop_words([" ".join(str(i) for i in range(1000)), "one"], share=0.3, seed=1)
    kept = [int(word) for word in views[0].split()]
    assert kept == sorted(kept)
    assert 640 < len(kept) < 760
    assert views[1] == "one"
    assert drop_words(["a b c d"], share=0.0) == ["a b c d"]


def test_unknown_metrics_say_what_there_is(model):
    with pytest.raises(InputError, match="prompt entropy"):
        layer_metrics(model, TEXTS, ["entropy"])
    with pytest.raises(InputError, match="no texts"):
        layer_vectors(model, [])
