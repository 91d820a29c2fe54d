"""Edges of a traced firing: they divide the logit exactly, and find a head wired by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import copying_model
from test_attention_decomposition import restless
from tiny import inputs_for

from polyhead.errors import InputError
from polyhead.heads._reading import read_layers
from polyhead.heads.attention_decomposition import LogitSVD
from polyhead.heads.trace import Firing, graph, upstream
from polyhead.heads.weights import read_weights
from polyhead.model import load

FAMILIES = ["bert", "distilbert", "gpt2", "gpt-neox", "llama", "qwen3", "gemma2", "gemma3", "modernbert", "opt"]


def one_row(family):
    return {"input_ids": inputs_for(family)["input_ids"][1:]}


def positive(model, inputs, layer):
    """A firing of the layer with the largest logit."""
    reading = next(read_layers(model, inputs, read_weights(model, fold=False, dtype=torch.float64), layers=[layer]))
    pairs = [(h, i, j) for h in range(4) for i in range(7) for j in range(i + 1)]
    return Firing(layer, *max(pairs, key=lambda pair: reading.logit(0, *pair)))


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_and_the_rest_make_up_the_kept_terms_on_each_side(family):
    share = 0.8
    model, inputs = restless(family), one_row(family)
    trace = upstream(model, inputs, positive(model, inputs, 1), share)
    kept = trace.terms[list(trace.kept)].sum()
    assert trace.terms.sum() == pytest.approx(trace.logit)
    assert kept >= share * trace.logit * (1 - 1e-9)
    for side in ("destination", "source"):
        edges = [edge for edge in trace.edges if edge.side == side]
        assert {edge.writer for edge in edges} == {(0, head) for head in range(4)}
        whole = sum(edge.weight for edge in edges) + sum(trace.rest[side].values())
        assert whole == pytest.approx(kept, rel=1e-4, abs=1e-6)
        assert any(abs(edge.weight) > 1e-6 * abs(kept) for edge in edges)


def test_an_edge_is_what_the_writer_adds_by_the_definition():
    """GPT-2, by hand: the head's vector through the frozen LayerNorm, times Omega of the kept terms."""
    model, inputs = restless("gpt2"), one_row("gpt2")
    firing = positive(model, inputs, 1)
    trace = upstream(model, inputs, firing, 0.8)
    block, norm = model.module.h[0], model.module.h[1].ln_1
    with model.record("heads", "tokens") as recording, torch.no_grad():
        model(**inputs)
    stream, place = recording.tokens[0, 1], firing.source
    wrote = recording.heads[0, 0, 2, place] @ block.attn.c_proj.weight[16:24]
    deviation = (stream[place].var(unbiased=False) + norm.eps).sqrt()
    through = (wrote - wrote.mean()) / deviation * norm.weight
    svd, kept = LogitSVD(model, 1, firing.head), list(trace.kept)
    d = torch.cat([norm(stream[firing.destination]), torch.ones(1)])
    expected = (d @ svd.left[:, kept] * svd.sizes[kept]) @ (svd.right[:-1, kept].T @ through)
    found = next(edge for edge in trace.edges if edge.writer == (0, 2) and edge.side == "source")
    assert found.weight == pytest.approx(expected.item(), rel=1e-6)


def repeated():
    generator = torch.Generator().manual_seed(4)
    half = torch.randperm(40, generator=generator)[:8]
    return {"input_ids": torch.cat([half, half])[None]}


def test_the_previous_token_head_is_found_behind_the_induction_head():
    model, inputs = load(copying_model()), repeated()
    firing = Firing(1, 0, 12, 5)  # token 12 is token 4; what followed it stands at 5
    trace = upstream(model, inputs, firing)
    best = trace.top(1)[0]
    assert (best.writer, best.side, best.position) == ((0, 0), "source", 5)
    assert best.weight > 0.8 * trace.logit
    edges = graph(model, inputs, firing, width=1)
    assert [edge.writer for edge in edges] == [(0, 0)]
    assert graph(model, inputs, firing, width=1, depth=0) == ()


def test_the_signal_is_what_the_kept_terms_read():
    """Taking it from what attention is given makes every kept term 0, and no smaller vector does."""
    model, inputs = restless("gpt2"), one_row("gpt2")
    firing = positive(model, inputs, 1)
    trace = upstream(model, inputs, firing, 0.8)
    reading = next(read_layers(model, inputs, read_weights(model, fold=False, dtype=torch.float64), layers=[1]))
    svd = LogitSVD(model, 1, firing.head)
    d, s = reading.x[0, firing.destination], reading.x[0, firing.source]
    for terms in (svd.terms(d - trace.signal("destination"), s), svd.terms(d, s - trace.signal("source"))):
        assert terms[list(trace.kept)].abs().max() < 1e-9
    basis = trace.basis["source"]
    least = torch.linalg.lstsq(basis.T, trace.readings["source"]).solution
    torch.testing.assert_close(trace.signal("source"), least)


def test_the_model_is_left_as_it_was_and_wrong_requests_are_refused():
    model, inputs = restless("gpt2"), one_row("gpt2")
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())
    upstream(model, inputs, positive(model, inputs, 1))
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()) == hooks
    with pytest.raises(InputError, match="one by one"):
        upstream(model, inputs_for("gpt2"), (1, 0, 2, 1))
    with pytest.raises(InputError, match="2 layers x 4"):
        upstream(model, inputs, (2, 0, 2, 1))
    with pytest.raises(InputError, match="7 tokens"):
        upstream(model, inputs, (1, 0, 7, 1))
    reading = next(read_layers(model, inputs, read_weights(model, fold=False, dtype=torch.float64), layers=[1]))
    low = min(((h, i, j) for h in range(4) for i in range(7) for j in range(i)), key=lambda p: reading.logit(0, *p))
    with pytest.raises(InputError, match="not positive"):
        upstream(model, inputs, (1, *low))
    assert np.isfinite(reading.logit(0, *low))
