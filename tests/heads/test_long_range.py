"""Positional heads and query-adaptive locality against their definitions, on models with and without windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_attention_profile import with_numbers
from tiny import tiny

from polyhead.errors import InputError
from polyhead.heads.long_context import QueryAdaptiveLocality
from polyhead.heads.rope_positional import PositionalHeads, rope_decompose

TEXT = " ".join(str(3 + (7 * i + i * i) % 85) for i in range(40))
TOKENS = 42


def attention_of(model, text=TEXT):
    with model.record("attention") as recording, torch.no_grad():
        model(input_ids=model.tokenizer([text])["input_ids"])
    return [recording.layer_attention(layer)[0].double().numpy() for layer in range(model.layers)]


class One:
    """The tokenizer of tests for one text: plain lists."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, text, truncation=True, max_length=512, **_):
        if isinstance(text, list):
            return self.inner(text)
        return {"input_ids": self.inner([text])["input_ids"][0].tolist()[:max_length]}


def decoder(family, **changes):
    model = with_numbers(tiny(family, **changes))
    model.__dict__["tokenizer"] = One(model.tokenizer)
    return model


@pytest.mark.parametrize("layout", ["halves", "interleaved"])
def test_pairs_sum_to_the_logits(layout):
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(3, n, 8, generator=generator) for n in (5, 7))
    pairs = rope_decompose(queries, keys, 0.5, layout)
    assert pairs.shape == (3, 4, 5, 7)
    torch.testing.assert_close(pairs.sum(1), queries @ keys.transpose(1, 2) * 0.5)
    first, second = (1, 5) if layout == "halves" else (2, 3)
    expected = (queries[0, 2, first] * keys[0, 4, first] + queries[0, 2, second] * keys[0, 4, second]) * 0.5
    torch.testing.assert_close(pairs[0, 1, 2, 4], expected)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_the_table_is_its_definition(family):
    window = {"sliding_window": 20} if family == "gemma3" else {}
    model = decoder(family, **window)
    score = PositionalHeads(min_distance=6, rows=99)
    table = score.measure(model, [TEXT])
    caught = {}
    with torch.no_grad(), model.tap_attention(lambda layer, call: caught.update({layer: call})):
        model(input_ids=model.tokenizer([TEXT])["input_ids"])
    weights = attention_of(model)
    for layer, call in caught.items():
        reach = getattr(call.module, "sliding_window", None) or TOKENS
        for head in range(4):
            q, k = call.query[0, head].double().numpy(), call.key[0, head // 2].double().numpy()
            scale, half = call.kwargs["scaling"], q.shape[1] // 2
            left, right, mass = [[] for _ in range(half)], [[] for _ in range(half)], []
            for row in range(8, TOKENS):
                far = [j for j in range(row) if row - j > 6 and row - j < reach]
                mass.append(weights[layer][head, row, far].sum())
                if len(far) < 2:
                    continue
                logit = np.array([q[row] @ k[j] * scale for j in far])
                for pair in range(half):
                    part = np.array([q[row, pair] * k[j, pair] + q[row, pair + half] * k[j, pair + half] for j in far])
                    left[pair] += list(part - part.mean())
                    right[pair] += list(logit - logit.mean())
            expected = [np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b)) for a, b in zip(left, right, strict=True)]
            scaled = table.correlation[layer, head]
            np.testing.assert_allclose(scaled, np.array(expected), atol=1e-4)
            assert table.far[layer, head] == pytest.approx(np.mean(mass), abs=1e-5)
    slow = table.correlation[..., 2:].mean(-1)
    np.testing.assert_allclose(score.score(model, [TEXT]).values, slow)


def test_a_window_shorter_than_the_distance_has_no_value():
    model = decoder("gemma3", sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    values = PositionalHeads(min_distance=10).score(model, [TEXT]).values
    assert np.isnan(values[0]).all()
    assert np.isfinite(values[1]).all()


def test_slow_pairs_are_told_from_fast_ones():
    model = decoder("llama")
    with torch.no_grad():
        for layer in model.module.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                weight = projection.weight.view(-1, 8, 32)
                weight[:, [0, 1, 4, 5]] = 0  # head_dim 8: the pairs are (0, 4), (1, 5), (2, 6), (3, 7)
                weight.mul_(10)
    table = PositionalHeads(min_distance=6).measure(model, [TEXT])
    assert np.isnan(table.correlation[..., :2]).all()
    assert (table.correlation[..., 2:].max(-1) > 0.5).all()


@pytest.mark.parametrize("moments", ["local", "calibrated"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_masses_are_their_definition(family, moments):
    window = {"sliding_window": 20} if family == "gemma3" else {}
    model = decoder(family, **window)
    score = QueryAdaptiveLocality(window=5, sinks=3, moments=moments, rows=99)
    if moments == "calibrated":
        score.fit(model, [TEXT, TEXT[:60]])
    result = score.measure(model, [TEXT])
    caught, keys = {}, {0: [], 1: []}
    for text in (TEXT[:60], TEXT):
        with torch.no_grad(), model.tap_attention(lambda layer, call: caught.update({layer: call})):
            model(input_ids=model.tokenizer([text])["input_ids"])
        for layer, call in caught.items():
            keys[layer].append(call.key[0].double().numpy())
    weights = attention_of(model)
    for layer, call in caught.items():
        reach = getattr(call.module, "sliding_window", None) or TOKENS
        for head in range(4):
            q, k = (
                call.query[0, head].double().numpy() * call.kwargs["scaling"],
                call.key[0, head // 2].double().numpy(),
            )
            every = np.concatenate([one[head // 2] for one in keys[layer]])
            for at, row in enumerate(range(8, TOKENS)):
                seen = [j for j in range(row + 1) if row - j < reach]
                recent = [j for j in seen if row - j < 5]
                near = [j for j in seen if row - j < 5 or j < 3]
                far = [j for j in seen if j not in near]
                logits = k @ q[row]
                assert result.local[at, layer, head] == pytest.approx(math.log(np.exp(logits[near]).sum()), abs=1e-4)
                assert result.far[at, layer, head] == pytest.approx(math.log(np.exp(logits[far]).sum()), abs=1e-4)
                of = k[recent] if moments == "local" else every
                mean, covariance = of.mean(0), np.cov(of.T, bias=True)
                expected = math.log(len(far)) + q[row] @ mean + q[row] @ covariance @ q[row] / 2
                assert result.predicted[at, layer, head] == pytest.approx(expected, abs=1e-4)
                share = weights[layer][head, row, near].sum()
                assert result.share("far")[at, layer, head] == pytest.approx(share, abs=1e-5)
    needs = (result.share() < 0.6).mean(0)
    np.testing.assert_array_equal(score.score(model, [TEXT]).values, needs)


def test_a_sliding_layer_is_always_local():
    model = decoder("gemma3", sliding_window=6, layer_types=["sliding_attention", "full_attention"])
    score = QueryAdaptiveLocality(window=6, sinks=0, tau=0.999)
    values = score.score(model, [TEXT]).values
    assert (values[0] == 0).all()
    assert (values[1] > 0.9).all()


def test_acting_hides_the_far_tokens_of_local_queries_only():
    model = decoder("llama")
    inputs = {"input_ids": model.tokenizer([TEXT])["input_ids"]}
    with torch.no_grad():
        plain = model(**inputs)[0]
        with QueryAdaptiveLocality(window=5, sinks=3, tau=1.1).on(model) as shares:
            none_local = model(**inputs)[0]
        assert shares == [0.0, 0.0]
        with QueryAdaptiveLocality(window=5, sinks=3, tau=0.0).on(model) as shares, model.record("heads") as recording:
            model(**inputs)
        assert shares == [1.0, 1.0]
        torch.testing.assert_close(model(**inputs)[0], plain)
    torch.testing.assert_close(none_local, plain)
    caught = {}
    with torch.no_grad(), model.tap_attention(lambda layer, call: caught.update({layer: call})):
        model(**inputs)
    call, row = caught[0], 30
    kept = [0, 1, 2, *range(26, 31)]
    for head in range(4):
        k, v = call.key[0, head // 2, kept].double(), call.value[0, head // 2, kept].double()
        weights = torch.softmax(k @ call.query[0, head, row].double() * call.kwargs["scaling"], 0)
        torch.testing.assert_close(recording.heads[0, 0, head, row].double(), weights @ v, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="one whole text"), torch.no_grad(), QueryAdaptiveLocality().on(model):
        model(input_ids=torch.ones(2, 5, dtype=torch.long))


def test_refusals():
    with pytest.raises(InputError, match="no rotary"):
        PositionalHeads().measure(decoder("gpt2"), [TEXT])
    with pytest.raises(InputError, match="longer texts"):
        PositionalHeads().measure(decoder("llama"), [TEXT])
    with pytest.raises(InputError, match="rotates only"):
        PositionalHeads().measure(decoder("gpt-neox"), [TEXT])
    with pytest.raises(InputError, match="longer texts"):
        QueryAdaptiveLocality().measure(decoder("llama"), [TEXT])
    with pytest.raises(InputError, match="fit"):
        QueryAdaptiveLocality(moments="calibrated").measure(decoder("llama"), [TEXT])
    with pytest.raises(InputError, match="both directions"):
        QueryAdaptiveLocality(window=2, sinks=1).measure(decoder("bert"), [TEXT])
    with pytest.raises(InputError, match="softcap"):
        QueryAdaptiveLocality(window=2, sinks=1).measure(decoder("gemma2", attention="eager"), [TEXT])
