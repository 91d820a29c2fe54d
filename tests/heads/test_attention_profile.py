"""Attention profiles and relations against their definitions in float64, and heads whose pattern is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from by_hand import copying_model
from tiny import tiny

import polyhead
from polyhead.errors import InputError
from polyhead.heads import scores
from polyhead.heads.attention_profile import (
    AttentionEntropy,
    NextTokenAttention,
    attention_profile,
    head_distance,
)
from polyhead.heads.relations import ParsedSentence, RelationAccuracy, word_attention
from polyhead.heads.streaming import stream_attention

TEXTS = ["5 6 7 8 9", "11 12 1 13 14 15 16 2", "3 4"]


class Numbers:
    """A tokenizer of numbers: 90 begins, 91 ends a text, 0 pads; 1 is a full stop, 2 an exclamation mark."""

    all_special_ids = (0, 90, 91)
    is_fast = True

    def __init__(self, side: str = "right", split: bool = False) -> None:
        self.side, self.split = side, split
        self.begin, self.end = 90, 91

    def __call__(self, texts, is_split_into_words=False, **_):
        rows, words = [], []
        for text in texts:
            ids, of = [self.begin], [None]
            for word, number in enumerate(map(int, text if is_split_into_words else text.split())):
                pieces = [number, number + 1] if self.split and number % 5 == 0 else [number]
                ids += pieces
                of += [word] * len(pieces)
            rows.append([*ids, self.end])
            words.append([*of, None])
        most = max(map(len, rows))
        pads = [[0] * (most - len(row)) for row in rows]
        nones = [[None] * len(pad) for pad in pads]
        left = self.side == "left"
        ids = [pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)]
        of = [pad + row if left else row + pad for row, pad in zip(words, nones, strict=True)]
        mask = [
            [0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p)
            for r, p in zip(rows, pads, strict=True)
        ]
        found = Coded(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))
        found.words = of
        return found

    def decode(self, ids):
        return {1: ".", 2: "!"}.get(ids[0], f"w{ids[0]}")


class Coded(dict):
    def word_ids(self, row):
        return self.words[row]


def with_numbers(module, side: str = "right", split: bool = False):
    model = polyhead.load(module)
    model.__dict__["tokenizer"] = Numbers(side, split)
    return model


def by_definition(model, texts):
    """Every statistic in float64 in plain loops, one text at a time."""
    sums = {name: np.zeros((model.layers, model.heads)) for name in polyhead_names()}
    counts = dict.fromkeys(sums, 0)
    for text in texts:
        inputs = model.tokenize([text])
        ids = inputs["input_ids"][0].tolist()
        n = len(ids)
        with model.record("attention") as recording, torch.no_grad():
            model(**inputs)
        for layer in range(model.layers):
            weights = recording.layer_attention(layer)[0].double().numpy()
            causal = weights[:, 0, 1:].max() == 0
            for i in range(n):
                may = [j for j in range(n) if (not causal or j <= i) and seen(model, layer, i, j)]
                for head in range(model.heads):
                    row = weights[head, i]
                    entropy = -sum(w * math.log(w) for w in row if w > 0)
                    values = {"entropy": entropy, "distance": sum(w * abs(i - j) for j, w in enumerate(row))}
                    values["delimiter"] = sum(row[j] for j in range(n) if ids[j] in (0, 90, 91))
                    values["punctuation"] = sum(row[j] for j in range(n) if ids[j] in (1, 2))
                    values["same"] = row[i]
                    if len(may) > 1:
                        values["broad"] = entropy / math.log(len(may))
                    if i - 1 in may:
                        values["previous"] = row[i - 1]
                    if i + 1 in may:
                        values["next"] = row[i + 1]
                    for name, value in values.items():
                        sums[name][layer, head] += value
                        if head == 0 and layer == 0:
                            counts[name] += 1
    return {name: sums[name] / counts[name] if counts[name] else sums[name] * np.nan for name in sums}


def polyhead_names():
    return ("entropy", "broad", "distance", "delimiter", "punctuation", "previous", "next", "same")


def seen(model, layer, i, j):
    window = getattr(model.attention_layers[layer].module, "sliding_window", None)
    return not window or i - j < window


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3", "mpnet", "distilbert", "bloom"])
def test_every_statistic_is_its_definition_and_padding_changes_nothing(family):
    model = with_numbers(tiny(family), "left" if family in ("llama", "gemma3", "bloom") else "right")
    expected = by_definition(model, TEXTS)
    for batch_size in (1, 2, 3):
        found = attention_profile(model, TEXTS, batch_size=batch_size)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name].values, values, atol=2e-5, err_msg=f"{name}, batch {batch_size}")


def test_the_previous_token_head_made_by_hand_is_told_by_its_numbers():
    model = with_numbers(copying_model())
    model.tokenizer.begin, model.tokenizer.end = 30, 31
    profile = attention_profile(model, ["4 5 6 7 8 9 10 11", "20 21 22 23 24 25"], batch_size=1)
    assert profile["previous"].top(1) == [(0, 0)]
    assert profile["previous"].values[0, 0] > 0.99
    assert profile["entropy"].values[0, 0] < 0.05 < profile["entropy"].values[0, 1]
    np.testing.assert_allclose(profile["broad"].values[0, 1:], 1, atol=1e-5)  # heads of zero weights attend evenly
    assert abs(profile["distance"].values[0, 0] - (9 + 7) / (10 + 8)) < 0.02  # one everywhere but at the first token


def test_streaming_holds_one_layer_at_a_time():
    model = with_numbers(tiny("bert"))
    alive, most = [], []

    def visit(pattern):
        import weakref

        alive.append(weakref.ref(pattern.weights))
        most.append(sum(one() is not None for one in alive))

    stream_attention(model, model.tokenize(TEXTS), visit)
    assert most == [1, 1]


def test_scores_are_the_profile_and_are_listed():
    model = with_numbers(tiny("bert"))
    found = AttentionEntropy(batch_size=2).score(model, TEXTS)
    assert found == attention_profile(model, TEXTS)["entropy"]
    assert {f"attention-{name}" for name in polyhead_names()} <= set(scores())
    with pytest.raises(InputError, match="causal"):
        NextTokenAttention().score(with_numbers(tiny("gpt2"), "left"), TEXTS)
    with pytest.raises(InputError, match="list of at least one text"):
        AttentionEntropy().score(model, "one text")


def test_head_distance_is_the_jensen_shannon_divergence():
    model = with_numbers(tiny("bert"))
    found = head_distance(model, TEXTS, rows=99)
    total, queries = np.zeros((8, 8)), 0
    for text in TEXTS:
        with model.record("attention") as recording, torch.no_grad():
            model(**model.tokenize([text]))
        weights = recording.attention[0].flatten(0, 1).double().numpy()

        def divergence(p, q):
            return float((p * np.log(p / q)).sum())

        for a in range(8):
            for b in range(8):
                for p, q in zip(weights[a], weights[b], strict=True):
                    m = (p + q) / 2
                    total[a, b] += (divergence(p, m) + divergence(q, m)) / 2
        queries += weights.shape[1]
    np.testing.assert_allclose(found, total / queries, atol=1e-7)
    assert (found.diagonal() < 1e-12).all()
    np.testing.assert_allclose(head_distance(model, TEXTS, rows=2), found, atol=0.05)


def test_tokens_become_words_by_sum_into_and_mean_from():
    weights = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.0, 0.5, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0]]])
    found = word_attention(weights, [None, 0, 0, 1], 2)[0]
    first = [((0.3 + 0.2) + (0.5 + 0.5)) / 2, (0.1 + 0.0) / 2]
    np.testing.assert_allclose(found.numpy(), [first, [0.0, 0.0]], atol=1e-7)


@pytest.mark.parametrize("direction", ["to-head", "to-dependent"])
@pytest.mark.parametrize("family", ["bert", "llama", "mpnet"])
def test_relation_accuracy_is_its_definition(family, direction):
    model = with_numbers(tiny(family), "left" if family == "llama" else "right", split=True)
    parsed = [
        ParsedSentence(("5", "6", "7", "8"), (1, 2, -1, 2), ("det", "nsubj", "root", "obj")),
        ParsedSentence(("10", "12", "13", "15", "16", "20"), (1, -1, 1, 4, 1, 1), ("det", "", "x", "det", "obj", "x")),
        ParsedSentence(("3", "4"), (1, -1), ("det", "root")),
    ]
    table = RelationAccuracy(direction=direction, batch_size=2).measure(model, parsed)
    hits: dict[str, list] = {}
    for one in parsed:
        coded = model.tokenizer([one.words], is_split_into_words=True)
        of = coded.word_ids(0)
        with model.record("attention") as recording, torch.no_grad():
            model(**coded)
        weights = recording.attention[0].double().numpy()
        n = len(one.words)
        for word, head in enumerate(one.heads):
            if head < 0:
                continue
            source, target = (word, head) if direction == "to-head" else (head, word)
            row = np.full((2, 4, n), -1.0)
            for other in range(n):
                if other != source:
                    into = weights[..., [t for t, w in enumerate(of) if w == other]].sum(-1)
                    row[..., other] = into[..., [t for t, w in enumerate(of) if w == source]].mean(-1)
            hits.setdefault(one.relations[word], []).append(row.argmax(-1) == target)
    assert set(table.hits) == set(hits)
    for name, rows in hits.items():
        np.testing.assert_array_equal(table.hits[name], np.stack(rows).astype(float))
    assert table.offset_baseline("det") == (1, 1.0)
    assert table.accuracy().values.shape == (2, 4)
    assert table.left_out == 0
    every = np.concatenate([np.stack(rows) for rows in hits.values()])
    np.testing.assert_allclose(table.accuracy().values, every.mean(0))
    assert table.best()[0]["accuracy"] == max(np.stack(rows).mean(0).max() for rows in hits.values())


def test_refusals_of_relations():
    model = with_numbers(tiny("bert"))
    one = ParsedSentence(("3", "4"), (1, -1), ("det", "root"))
    with pytest.raises(InputError, match="parser's output"):
        RelationAccuracy().score(model)
    with pytest.raises(InputError, match="there are det"):
        RelationAccuracy(relation="obj").score(model, [one])
    with pytest.raises(InputError, match="another word"):
        ParsedSentence(("a", "b"), (0, -1), ("det", "root"))
    with pytest.raises(InputError, match="one of each"):
        ParsedSentence(("a", "b"), (1,), ("det",))
    with pytest.raises(InputError, match="No pairs"):
        RelationAccuracy().measure(model, [ParsedSentence(("3",), (-1,), ("root",))])
    model.__dict__["tokenizer"] = SimpleNamespace(is_fast=False)
    with pytest.raises(InputError, match="fast one"):
        RelationAccuracy().measure(model, [one])


@pytest.mark.real_model
def test_minilm_has_a_previous_token_head(minilm_path):
    model = polyhead.load(minilm_path)
    texts = ["Every head of this encoder looks somewhere, and one looks back.", "Which one it is, the profile tells."]
    previous = attention_profile(model, texts)["previous"]
    assert previous.top(1) == [(0, 2)]
    assert previous.values[0, 2] > 0.9
