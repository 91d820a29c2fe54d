"""Concept and evidence heads: planted heads are found, and the numbers are those of whole attention matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from by_hand import copying_model
from tiny import inputs_for, tiny

import polyhead
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.span_heads import ConceptHeads, ConceptSample, CopySample, OcrHeads, evidence_tokens, jaccard

CONCEPTS = 4
PLANTED = np.random.default_rng(0).permutation(16).reshape(4, 4) % CONCEPTS


def concept_model():
    """Four layers of four heads; head h of layer l looks at tokens of concept PLANTED[l, h] (ids 1 to 4)."""
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(vocab_size=8, n_positions=32, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2Model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.wte.weight[:, :8] = torch.eye(8)
        for layer, block in enumerate(model.h):
            for head in range(4):
                block.attn.c_attn.bias[head * 8 + 1 + PLANTED[layer, head]] = 3.0  # the query, the same everywhere
                block.attn.c_attn.weight[:8, 32 + head * 8 : 32 + head * 8 + 8] = torch.eye(8)
    return polyhead.load(model)


def concept_samples(n: int = 6) -> list[ConceptSample]:
    random = np.random.default_rng(1)
    found = []
    for _ in range(n):
        ids = random.permutation([1, 2, 3, 4, 5, 6, 7, 5, 6])
        places = {f"c{concept}": [int(np.flatnonzero(ids == concept + 1)[0])] for concept in range(CONCEPTS)}
        tokens = torch.tensor([[*ids.tolist(), 5, 6]])
        found.append(ConceptSample({"input_ids": tokens}, [9, 10], places))
    return found


def test_every_planted_head_is_found():
    maps = ConceptHeads().measure(concept_model(), concept_samples())
    for concept in range(CONCEPTS):
        np.testing.assert_array_equal(maps[f"c{concept}"].values, (concept == PLANTED).astype(float))
    assert ConceptHeads("c2").score(concept_model(), concept_samples()) == maps["c2"]


@pytest.mark.parametrize("family", ["bert", "llama", "gemma3", "t5"])
def test_points_are_those_of_whole_matrices(family):
    model = polyhead.load(tiny(family, attention="eager" if family == "t5" else None))
    inputs = {"input_ids": inputs_for(family)["input_ids"][1:]}
    spans = {"a": [0, 1], "b": [2], "c": [3, 4]}
    maps = ConceptHeads().measure(model, [ConceptSample(inputs, [5, 6], spans)])
    with model.record("attention") as recording, torch.no_grad():
        model(**inputs)
    weights = recording.attention[0].double().numpy()
    means = np.stack([weights[:, :, 5:7][..., span].mean((-1, -2)) for span in spans.values()])
    for at, name in enumerate(spans):
        np.testing.assert_array_equal(maps[name].values, means.argmax(0) == at)


def test_copy_scores_of_the_copying_head():
    model = polyhead.load(copying_model())
    ids = [20, 21, 5, 11, 12, 13, 22, 23, 5, 11, 12]
    sample = CopySample({"input_ids": torch.tensor([ids])}, [8, 9, 10], [11, 12, 13], [3, 4, 5])
    expected = np.zeros((2, 3))
    expected[1, 0] = 1
    np.testing.assert_array_equal(OcrHeads().score(model, [sample]).values, expected)
    other = CopySample(sample.inputs, sample.steps, sample.answer, [3, 4], written=[11, 0, 13])
    assert OcrHeads().score(model, [other]).values[1, 0] == pytest.approx(1 / 3)
    assert OcrHeads().score(model, [sample, other]).values[1, 0] == pytest.approx(2 / 3)
    base = polyhead.load(copying_model().transformer)
    np.testing.assert_array_equal(OcrHeads().score(base, [sample]).values, expected)


def test_evidence_is_by_intersection_over_union():
    assert evidence_tokens([(0, 0, 8, 8)], (2, 2), (16, 16)) == [0]
    assert evidence_tokens([(4, 0, 12, 8)], (2, 2), (16, 16)) == [0, 1]  # 32 / (64 + 64 - 32) = 1/3 each
    assert evidence_tokens([(4, 0, 12, 8)], (2, 2), (16, 16), iou=0.34) == []
    assert evidence_tokens([(0, 0, 8, 8), (8, 8, 16, 16)], (2, 2), (16, 16)) == [0, 3]
    with pytest.raises(InputError, match="empty"):
        evidence_tokens([(8, 0, 8, 8)], (2, 2), (16, 16))


def test_jaccard_of_two_maps():
    first, second = HeadMap([[0.2, 0.3, 0.0, np.nan]]), HeadMap([[0.2, 0.0, 0.0, 0.9]])
    assert jaccard(first, second) == pytest.approx(1 / 3)
    assert math.isnan(jaccard(first, second, threshold=2))


def test_refusals():
    model = concept_model()
    one = concept_samples(1)[0]
    with pytest.raises(InputError, match="No concept 'x'"):
        ConceptHeads("x").score(model, [one])
    with pytest.raises(InputError, match="ConceptSample"):
        ConceptHeads("x").score(model)
    with pytest.raises(InputError, match="same concepts"):
        ConceptHeads("c0").score(model, [one, ConceptSample(one.inputs, [1], {"c0": [1]})])
    with pytest.raises(InputError, match="of an input of 11 tokens"):
        ConceptHeads("c0").score(model, [ConceptSample(one.inputs, [99], one.concepts)])
    with pytest.raises(InputError, match="2 steps for 1"):
        OcrHeads().score(model, [CopySample(one.inputs, [1, 2], [1], [0])])
    with pytest.raises(InputError, match="CopySample"):
        OcrHeads().score(model)
