"""Logits in the singular basis: exact on many families, the definition in float64, and heads whose rank is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import inputs_for, tiny, tower_of

from polyhead.errors import InputError, UnreadableModelError
from polyhead.heads._reading import read_layers
from polyhead.heads.attention_decomposition import (
    LogitSparsity,
    LogitSVD,
    pair_terms,
    sparsity_curve,
    terms_needed,
)
from polyhead.heads.weights import read_weights
from polyhead.model import load

FAMILIES = [
    "bert", "distilbert", "albert", "gpt2", "opt", "gpt-neox", "llama", "mistral", "qwen2",
    "qwen3", "gemma2", "gemma3", "phi3", "modernbert", "vit", "dinov2", "whisper", "clip-text", "siglip-vision",
]  # fmt: skip


def restless(family, **changes):
    """A tiny model in float64 with biases and norm weights that matter."""
    module = tiny(family, **changes).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return load(module, tower=tower_of(family))


def inputs64(family):
    return {key: v.double() if v.is_floating_point() else v for key, v in inputs_for(family).items()}


def readings(model, inputs):
    return list(read_layers(model, inputs, read_weights(model, fold=False, dtype=torch.float64)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_terms_sum_to_the_models_own_logits(family):
    model, inputs, calls = restless(family), inputs64(family), {}

    def watch(layer, call):
        key = call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
        calls[layer] = call.query @ key.transpose(-1, -2) * call.kwargs.get("scaling", call.query.shape[-1] ** -0.5)

    with torch.no_grad(), model.tap_attention(watch):
        model(**inputs)
    pairs = np.array([(1, i, j) for i in range(5) for j in range(5)])
    for reading in readings(model, inputs):
        for head in range(4):
            left, right = reading.factors(head, pairs)
            expected = calls[reading.layer][1, head, :5, :5].flatten().double()
            torch.testing.assert_close((left * right).sum(-1), expected, rtol=1e-5, atol=1e-6)
            one = LogitSVD.at(reading, 1, head, 4, 2)
            whole = one.terms(reading.x[1, 4], reading.x[1, 2]) * reading.size(1, head, 4, 2)
            torch.testing.assert_close(whole.sum(), expected[22], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_equals_the_definition(family):
    """Omega in full, hidden + 1 square, and its singular values and vectors by one decomposition."""
    model = restless(family)
    layer = read_weights(model, fold=False, dtype=torch.float64).layers[1]
    query = torch.cat([layer.query[2], layer.query_bias[2][None]])
    key = torch.cat([layer.key[2], layer.key_bias[2][None]])
    omega = query @ key.T * 8**-0.5
    u, sizes, v = torch.linalg.svd(omega)
    found = LogitSVD(model, 1, 2)
    torch.testing.assert_close(found.sizes, sizes[:8], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((found.left * found.sizes) @ found.right.T, omega)
    d, s = torch.randn(2, 5, 32, dtype=torch.float64)
    ones = torch.ones(5, 1, dtype=torch.float64)
    expected = sizes[:8] * (torch.cat([d, ones], 1) @ u[:, :8]) * (torch.cat([s, ones], 1) @ v[:8].T)
    torch.testing.assert_close(found.terms(d, s), expected)
    torch.testing.assert_close(found.logit(d, s), (torch.cat([d, ones], 1) @ omega * torch.cat([s, ones], 1)).sum(-1))


def test_rotary_matrices_are_of_a_distance():
    model = restless("llama")
    near, same, far = (LogitSVD(model, 0, 1, distance=distance) for distance in (1, 1, 9))
    torch.testing.assert_close(near.sizes, same.sizes)
    assert (near.sizes / far.sizes - 1).abs().max() > 0.05
    reading = readings(model, inputs64("llama"))[0]
    torch.testing.assert_close(LogitSVD.at(reading, 1, 1, 5, 4).sizes, near.sizes, rtol=1e-5, atol=1e-6)


def test_how_many_terms_by_hand():
    terms = torch.tensor([[5.0, 3, 2, 0], [6, 3, 3, -2], [-1, -2, 1, 0], [0, 0, 0, 4]])
    assert terms_needed(terms, 0.9).nan_to_num(-1).tolist() == [3, 2, -1, 1]
    assert terms_needed(terms).nan_to_num(-1).tolist() == [3, 3, -1, 1]
    assert sparsity_curve(terms)[:2].tolist() == [[0.5, 0.8, 1, 1], [0.6, pytest.approx(0.9), 1.2, 1]]
    with pytest.raises(InputError, match="at most 1"):
        terms_needed(terms, 1.5)


def sharp(family="gpt2"):
    """Queries and keys made larger, so that heads fire."""
    model = restless(family)
    for block in model.module.h:
        block.attn.c_attn.weight.data[:, :64] *= 40
    return model


def test_a_head_of_rank_one_needs_one_term():
    model = sharp()
    weight, bias = model.module.h[0].attn.c_attn.weight.data, model.module.h[0].attn.c_attn.bias.data
    weight[:, 9:16], bias[8:16] = 0, 0  # all but one feature of head 1's queries
    bias[40:48] = 0
    weight[:, 8:9] *= 5
    values = LogitSparsity(share=1.0, threshold=0.2).sparsity(model, [inputs_for("gpt2", batch=8)])
    assert values[0, 1] == pytest.approx(1 - 1 / 8)
    assert np.nanmin(values) < 0.8


def test_sparsity_is_the_mean_over_firings():
    model, inputs = sharp(), inputs_for("gpt2", batch=4)
    with model.record("attention") as recording, torch.no_grad():
        model(**inputs)
    found = LogitSparsity(share=0.9, threshold=0.6).sparsity(model, [inputs])
    for reading in readings(model, inputs):
        svd = LogitSVD(model, reading.layer, 3)
        needed = []
        for row, tokens in ((0, 4), (1, 7), (2, 7), (3, 7)):
            for i in range(tokens):
                for j in range(tokens):
                    if recording.attention[row, reading.layer, 3, i, j] > 0.6:
                        terms = svd.terms(reading.x[row, i], reading.x[row, j])
                        if terms.sum() > 0:
                            ordered = sorted(terms.tolist(), reverse=True)
                            reached = [sum(ordered[: k + 1]) >= 0.9 * sum(ordered) for k in range(8)]
                            needed.append(reached.index(True) + 1)
        assert len(needed) > 3
        assert found[reading.layer, 3] == pytest.approx(1 - np.mean(needed) / 8)


@pytest.mark.parametrize("family", ["bert", "gemma3"])
def test_a_padded_batch_equals_its_rows_one_by_one(family):
    model, inputs = restless(family), inputs_for(family)
    together = list(pair_terms(model, inputs, threshold=0.15))
    for row, length in ((0, 4), (1, 7)):
        alone = pair_terms(model, {"input_ids": inputs["input_ids"][row : row + 1, :length]}, threshold=0.15)
        for both, one in zip(together, alone, strict=True):
            mine = both.pairs[:, 0] == row
            assert (both.pairs[mine][:, 1:] == one.pairs[:, 1:]).all()
            torch.testing.assert_close(both.terms[mine].sum(-1), one.terms.sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "bert", "qwen3"])
def test_bfloat16_terms_sum_to_its_logits(family):
    model = load(tiny(family), dtype="bfloat16")
    exact = load(tiny(family))
    half, full = (readings(m, inputs_for(family)) for m in (model, exact))
    for a, b in zip(half, full, strict=True):
        assert a.logit(1, 2, 4, 1) == pytest.approx(b.logit(1, 2, 4, 1), abs=0.03 * max(1, abs(b.logit(1, 2, 4, 1))))


def test_wrong_data_heads_and_models_are_refused():
    model = restless("bert")
    with pytest.raises(InputError, match="2 layers x 4"):
        LogitSVD(model, 0, 4)
    with pytest.raises(InputError, match="list of texts"):
        LogitSparsity().score(model, "one text")
    with pytest.raises(InputError, match="between 0 and 1"):
        LogitSparsity(threshold=0).sparsity(model, [])
    with pytest.raises(UnreadableModelError, match="interface"):
        LogitSVD(load(tiny("bloom")), 0, 0)
