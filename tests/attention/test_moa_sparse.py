"""Spans of heads against their definition: masks, caches, the profile and the programme."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import polyhead
from polyhead.attention import AttentionShape
from polyhead.attention.moa_plan import InfluenceProfile, SpanPlan, profile_attention_influence, search_plan
from polyhead.attention.moa_sparse import ElasticSpan, SpanAttention, span_density
from polyhead.errors import InputError
from polyhead.heads.needles import NeedlePrompt, Needles
from polyhead.tap import AttentionCall, attention_weights, tapped
from tests.attention.cases import Case
from tests.tiny import tiny

SPANS = [ElasticSpan(1), ElasticSpan(0, 0.4), ElasticSpan(3), ElasticSpan(1.5, 1)]
SHAPE = AttentionShape(32, 4)
CASES = {
    "moa-sparse": Case(lambda causal: SpanAttention(SHAPE, causal=causal, spans=SPANS, sinks=1), both=False),
    "moa-sparse-groups": Case(
        lambda causal: SpanAttention(
            AttentionShape(32, 4, kv_heads=2, bias=True), causal=causal, spans=SPANS[:2] + SPANS[:2], sinks=2
        ),
        both=False,
    ),
}


def test_weights_by_definition_and_states_by_need() -> None:
    torch.manual_seed(0)
    layer, hidden = SpanAttention(SHAPE, spans=SPANS, sinks=1).double(), torch.randn(1, 12, 32, dtype=torch.float64)
    q, k = (layer.split(proj(hidden))[0] for proj in (layer.q_proj, layer.k_proj))
    found = layer.attention_weights(hidden)[0]
    density = np.zeros(4)
    for h, span in enumerate(SPANS):
        for i in range(12):
            reach = max(1, int(span.start + span.grow * (i + 1)))
            seen = [j for j in range(i + 1) if i - j < reach or j < 1]
            density[h] += len(seen) / 78
            wanted = torch.zeros(12, dtype=torch.float64)
            wanted[seen] = (k[h, seen] @ q[h, i] / 8**0.5).softmax(0)
            assert torch.allclose(found[h, i], wanted, atol=1e-10)
    assert np.allclose(span_density(SPANS, 12, sinks=1), density)
    _, state = layer.step(hidden)
    # the next query reaches 0, 5 - 1, 2 and all tokens back, and the first token besides
    assert state.tensors["keys"].shape == (1, 1 + (4 + 1) + (2 + 1) + 12, 8)


def needles(model: polyhead.HeadedModel, count: int = 2, tokens: int = 9) -> Needles:
    draw = np.random.default_rng(0)
    rows = [tuple(int(i) for i in draw.integers(3, 99, tokens + 2)) for _ in range(count)]
    return Needles(tuple(NeedlePrompt(row[:tokens], row[tokens:], (1, 3)) for row in rows))


def test_profile_is_the_first_order_of_leaving_weights_out() -> None:
    """Against finite differences of the loss along the paper's change of weights, in a layer of a model."""
    torch.manual_seed(0)
    model = polyhead.load(LlamaForCausalLM(tiny("llama").config).double().eval())
    one = needles(model, 1, tokens=6)
    spans = [ElasticSpan(2), ElasticSpan(0, 0.5), ElasticSpan(0, 1)]
    profile = profile_attention_influence(model, one, spans, sinks=1)
    assert profile.losses.shape == (1, 2, 4, 3)
    assert np.allclose(profile.losses[..., 2], 0)
    prompt = one.prompts[0]
    ids = torch.tensor([[*prompt.prompt, *prompt.answer[:-1]]])

    def loss(layer: int, head: int, i: int, j: int, by: float) -> float:
        at = -1

        def watch(call: AttentionCall) -> torch.Tensor | None:
            nonlocal at
            at += 1
            if at != layer:
                return None
            weights = attention_weights(call)[0, head, i]
            change = weights * weights[j] / (1 - weights[j])
            change[j] = -weights[j]
            out = call.output.clone()
            out[0, i, head] += by * (change @ call.value[0, head // 2])
            return out

        with torch.no_grad(), tapped(model.module, watch):
            logits = model(input_ids=ids).logits
        return F.cross_entropy(logits[0, -2:], torch.tensor(prompt.answer)).item()

    for layer, head in ((0, 1), (1, 2)):
        wanted = 0.0
        for i in range(ids.shape[1]):
            for j in range(1, i - 1):  # left out by a span of 2 with one sink
                wanted += (loss(layer, head, i, j, 0.05) - loss(layer, head, i, j, -0.05)) / 0.1
        assert profile.losses[0, layer, head, 0] == pytest.approx(wanted, rel=2e-3)  # the model's norms are float32


@pytest.mark.parametrize("objective", ["sum", "worst"])
def test_plan_is_the_best_of_all(objective: str) -> None:
    draw = np.random.default_rng(1)
    spans = (ElasticSpan(2), ElasticSpan(0, 0.5), ElasticSpan(0, 1))
    profile = InfluenceProfile(draw.random((2, 2, 2, 3)) * [3, 2, 1], (8, 16), spans, 1)
    density = np.stack([span_density(spans, length, 1) for length in (8, 16)])
    best = np.inf
    for pick in product(range(3), repeat=4):
        if (density[:, pick].mean(1) <= 0.7).all():
            losses = profile.losses.reshape(2, 4, 3)[:, np.arange(4), pick].sum(1)
            best = min(best, losses.sum() if objective == "sum" else losses.max())
    plan = search_plan(profile, 0.7, objective=objective)  # type: ignore[arg-type]
    picked = [spans.index(span) for row in plan.spans for span in row]
    losses = profile.losses.reshape(2, 4, 3)[:, np.arange(4), picked].sum(1)
    assert (losses.sum() if objective == "sum" else losses.max()) == pytest.approx(best)
    assert plan.cost == pytest.approx(losses.sum())
    assert max(plan.density(8), plan.density(16)) <= 0.7 + 1e-9
    assert plan.to_map(16).values.tolist() == [[span.at(16) for span in row] for row in plan.spans]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_plan_on_a_model(family: str) -> None:
    """A plan of whole spans changes nothing; short spans cut off what lies behind; padding on the left is not text."""
    torch.manual_seed(0)
    model = polyhead.load(tiny(family))
    ids = torch.randint(3, 99, (1, 9))
    whole = SpanPlan(((ElasticSpan(0, 1),) * 4,) * 2)
    short = SpanPlan(((ElasticSpan(2),) * 4,) * 2, sinks=0)
    with torch.no_grad():
        plain = model(input_ids=ids).last_hidden_state
        with whole.on(model):
            assert torch.allclose(model(input_ids=ids).last_hidden_state, plain, atol=1e-6)
        changed = ids.clone()
        changed[0, 5] = 50  # two layers of span 2 carry the last token's sight back to place 6
        with short.on(model):
            cut = model(input_ids=ids).last_hidden_state
            assert torch.allclose(model(input_ids=changed).last_hidden_state[0, 8], cut[0, 8], atol=1e-6)
            padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
            mask = (torch.arange(12) >= 3).long()[None]
            places = (torch.arange(12)[None] - 3).clamp_min(0)
            beside = model(input_ids=padded, attention_mask=mask, position_ids=places).last_hidden_state
        assert not torch.allclose(cut[0, 8], plain[0, 8], atol=1e-3)
        assert torch.allclose(beside[:, 3:], cut, atol=1e-5)
    with pytest.raises(InputError, match="heads a layer"), SpanPlan(((ElasticSpan(2),) * 4,)).on(model):
        pass


def test_bad_knobs_are_refused() -> None:
    for start, grow in ((-1, 0), (1, 1.5)):
        with pytest.raises(InputError, match="expected start"):
            ElasticSpan(start, grow)
    with pytest.raises(InputError, match="a span a head"):
        SpanAttention(SHAPE, spans=SPANS[:3])
    with pytest.raises(InputError, match="no spans"):
        SpanAttention(None)
    profile = InfluenceProfile(np.zeros((1, 1, 1, 1)), (8,), (ElasticSpan(8),), 0)
    with pytest.raises(InputError, match=r"at least 1\.000"):
        search_plan(profile, 0.5)
    with pytest.raises(InputError, match="'sum' or 'worst'"):
        search_plan(profile, 1.0, objective="mean")  # type: ignore[arg-type]
    model = polyhead.load(tiny("llama"))
    with pytest.raises(InputError, match="lm_head"):
        profile_attention_influence(model, needles(model), [ElasticSpan(2)])
    with pytest.raises(InputError, match="at least one"):
        profile_attention_influence(model, needles(model), [])
