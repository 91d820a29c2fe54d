"""Information flow: edges against the definition in float64, sums of 1, a route known by construction, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import FALLBACK, FAMILIES, VISION, inputs_for, tiny, tower_of

from polyhead.errors import InputError, UnreadableModelError
from polyhead.heads.flow_graph import FlowGraph, FlowNode
from polyhead.heads.info_flow_routes import InformationFlowRoutes
from polyhead.heads.residual import blocks
from polyhead.model import HeadedModel, load

READ = [family for family in FAMILIES if family not in ("falcon", "t5")]


def restless(family: str, **changes) -> HeadedModel:
    """A tiny model in float64 whose norms, biases and scales all do something."""
    module = tiny(family, **changes).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    model = load(module, tower=tower_of(family))
    for layer in model.attention_layers:
        layer.output_projection.weight.data *= 8
    return model


def wide(family):
    inputs = inputs_for(family)
    if family == "gemma2":  # by its own eager attention it gives NaN for padded rows in float64
        return {"input_ids": inputs["input_ids"][1:]}
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def flows_of(model, inputs):
    found = []
    InformationFlowRoutes().run(model, inputs, found.append)
    return found


@pytest.mark.parametrize("family", READ)
def test_a_block_is_put_together_from_its_parts(family):
    model, seen = restless(family), []

    def rebuild(block):
        attention = block.attention
        for scale in block.branch:
            attention = scale(attention) + scale.bias
        mid = block.x + attention
        if block.mid_norm is not None:
            mid = block.mid_norm(mid) + block.mid_norm.bias
        y = mid + block.feedforward
        if block.out_norm is not None:
            y = block.out_norm(y) + block.out_norm.bias
        # Gemma's norms run in float32 whatever they are given
        torch.testing.assert_close(mid, block.mid, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(y, block.y, rtol=1e-5, atol=1e-6)
        seen.append((block.kind, len(block.branch)))

    with blocks(model, rebuild), torch.no_grad():
        model(**wide(family))
    kind = "post-norm" if hasattr(model.config, "type_vocab_size") or family == "distilbert" else "sequential"
    kind = {"gpt-neox": "parallel", "mpnet": "post-norm"}.get(family, kind)
    assert seen == [(kind, int(family in ("gemma2", "gemma3", "dinov2")))] * 2


@pytest.mark.parametrize("family", [family for family in READ if family not in FALLBACK])
def test_the_edges_into_every_node_sum_to_one(family):
    inputs = wide(family)
    real = inputs.get("attention_mask", torch.ones(len(next(iter(inputs.values()))), 1)).bool()
    for flow in flows_of(restless(family), inputs):
        into = flow.heads.sum((1, 3)) + flow.residual + flow.bias
        out = flow.out_residual + flow.out_ffn + flow.out_bias
        if flow.parallel:
            into, out = into + out, into + out
        for total in (into, out):
            kept = total[real.expand_as(total)]
            torch.testing.assert_close(kept, torch.ones_like(kept))
        by_token = flow.heads.transpose(1, 2)
        assert (by_token[real.expand(by_token.shape[:2])] >= 0).all()


def proximities(y, parts):
    """The definition: max(0, |y| - |y - z|), normalised over all parts ``[parts, hidden]``."""
    near = torch.clamp(y.abs().sum() - (y - parts).abs().sum(-1), min=0)
    return near / near.sum()


def edge_vectors(model, inputs, layer, value):
    """alpha * v W_O of each head and source for the last token of row 0, ``[heads * sources, hidden]``."""
    with model.record("attention") as recording, torch.no_grad():
        model(**inputs)
    weights = recording.attention[0, layer, :, -1]
    groups = weights.shape[0] // value.shape[0]
    value = value.repeat_interleave(groups, 0)
    return torch.einsum("hs,hsd,hdo->hso", weights, value, model.output_weight(layer)).flatten(0, 1)


def caught(module, inputs, model):
    """What a sub-module was given and gave, for row 0."""
    found = []
    handle = module.register_forward_hook(lambda _, args, out: found.append((args[0][0], out[0])))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return found[0]


def test_bert_edges_follow_the_definition():
    model = restless("bert")
    inputs = {"input_ids": inputs_for("bert")["input_ids"][1:]}
    block = model.module.encoder.layer[1]
    x, value = caught(block.attention.self.value, inputs, model)
    value = value.view(-1, 4, 8).transpose(0, 1)
    dense, norm = block.attention.output.dense, block.attention.output.LayerNorm
    before, mid = caught(norm, inputs, model)
    spread = (before[-1].var(unbiased=False) + norm.eps).sqrt()
    parts = torch.cat([edge_vectors(model, inputs, 1, value), x[-1:], dense.bias[None]])
    parts = norm.weight * (parts - parts.mean(-1, keepdim=True)) / spread
    parts[-1] += norm.bias
    torch.testing.assert_close(parts.sum(0), mid[-1])
    expected = proximities(mid[-1], parts)
    flow = flows_of(model, inputs)[1]
    torch.testing.assert_close(flow.heads[0, :, -1].flatten(), expected[:-2])
    torch.testing.assert_close(torch.stack([flow.residual[0, -1], flow.bias[0, -1]]), expected[-2:])
    norm = block.output.LayerNorm
    before, out = caught(norm, inputs, model)
    spread = (before[-1].var(unbiased=False) + norm.eps).sqrt()
    parts = torch.stack([mid[-1], before[-1] - mid[-1]])
    parts = torch.cat([norm.weight * (parts - parts.mean(-1, keepdim=True)) / spread, norm.bias[None]])
    expected = proximities(out[-1], parts)
    got = torch.stack([flow.out_residual[0, -1], flow.out_ffn[0, -1], flow.out_bias[0, -1]])
    torch.testing.assert_close(got, expected)


def test_gemma_edges_go_through_the_norm_after_attention():
    model = restless("gemma3")
    inputs = {"input_ids": inputs_for("gemma3")["input_ids"][1:]}
    block = model.module.layers[1]
    _, value = caught(block.self_attn.v_proj, inputs, model)
    norm = block.post_attention_layernorm
    before, after = caught(norm, inputs, model)
    x, _ = caught(block.input_layernorm, inputs, model)
    mid, _ = caught(block.pre_feedforward_layernorm, inputs, model)
    scale = (before[-1].square().mean() + norm.eps).rsqrt() * (1 + norm.weight)
    parts = edge_vectors(model, inputs, 1, value.view(-1, 2, 8).transpose(0, 1)) * scale
    torch.testing.assert_close(parts.sum(0), after[-1], rtol=1e-6, atol=1e-6)  # the norm itself runs in float32
    expected = proximities(mid[-1], torch.cat([parts, x[-1:]]))
    flow = flows_of(model, inputs)[1]
    got = torch.cat([flow.heads[0, :, -1].flatten(), flow.residual[0, -1:]])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def previous_token_model():
    """GPT-2 of two layers in which only head 2 of layer 1 moves anything: from the previous token."""
    module = tiny("gpt2").double()
    for block in module.h:
        for parameter in (*block.attn.parameters(), *block.mlp.c_proj.parameters()):
            parameter.data.zero_()
    module.wpe.weight.data.zero_()
    module.wpe.weight.data[:8, :8] = 3 * torch.eye(8)
    module.wte.weight.data[:, :8] = 0
    attention = module.h[1].attn
    for p in range(8):
        attention.c_attn.weight.data[p, 16 + p] = 50  # query of head 2: where am I
        if p < 7:
            attention.c_attn.weight.data[p, 32 + 16 + p + 1] = 50  # key: who comes next
    attention.c_attn.weight.data[8:16, 64 + 16 : 64 + 24] = torch.eye(8)
    attention.c_proj.weight.data[16:24, 16:24] = 2 * torch.eye(8)
    return load(module)


def test_the_only_route_is_found(previous_token_model):
    ids = {"input_ids": torch.tensor([[5, 17, 33, 61, 80, 42]])}
    graph = InformationFlowRoutes(threshold=0.01).extract_ids(previous_token_model, ids)
    moved = [edge for edge in graph.edges if edge.head is not None]
    assert [(edge.target, edge.source, edge.head) for edge in moved] == [
        (FlowNode(1, "attention", 5), FlowNode(0, "out", 4), 2)
    ]
    assert {node.token for node in graph.nodes} == {4, 5}
    shares = graph.token_importance()
    assert shares[:4].tolist() == [0] * 4
    assert shares[4] == pytest.approx(moved[0].importance)
    assert shares.sum() == pytest.approx(1)
    heads = graph.head_importance()
    assert heads[1, 2] == moved[0].importance
    assert heads.sum() == heads[1, 2]


def test_a_route_is_what_can_be_reached_over_the_threshold():
    model, inputs = restless("llama"), {"input_ids": inputs_for("llama")["input_ids"][1:]}
    routes = InformationFlowRoutes(threshold=0.03)
    flows = flows_of(model, inputs)
    graph = routes.extract_ids(model, inputs, position=3)
    reached, expected = {(1, 3)}, 0
    for layer in (1, 0):
        for at, token in sorted(reached):
            if at != layer:
                continue
            if flows[layer].out_residual[0, token] < 0.03 and flows[layer].out_ffn[0, token] < 0.03:
                continue
            for head in range(4):
                for source in range(token + 1):
                    if flows[layer].heads[0, head, token, source] >= 0.03:
                        expected += 1
                        reached.add((layer - 1, source))
            if flows[layer].residual[0, token] >= 0.03:
                reached.add((layer - 1, token))
    assert expected > 1
    assert sum(edge.head is not None for edge in graph.edges) == expected
    assert all(edge.importance >= 0.03 for edge in graph.edges)
    assert {(node.layer, node.token) for node in graph.nodes if node.stage == "out"} == reached


@pytest.mark.parametrize("family", ["bert", "gemma3", "gpt2"])
@pytest.mark.parametrize("over", ["tokens", "route"])
def test_a_padded_batch_equals_its_rows_one_by_one(family, over):
    model, inputs = restless(family), inputs_for(family)
    score = InformationFlowRoutes(threshold=0.05, over=over)
    together, count = score.batch_importance(model, inputs)
    alone = [
        score.batch_importance(model, {"input_ids": inputs["input_ids"][row : row + 1, : 4 if row == 0 else 7]})
        for row in (0, 1)
    ]
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone[0][0] + alone[1][0]), rtol=1e-6, atol=1e-6)
    assert count == alone[0][1] + alone[1][1]


def test_left_padding_changes_nothing():
    model, ids = restless("llama"), inputs_for("llama")["input_ids"][:1, :4]
    padded = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), ids], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    score = InformationFlowRoutes()
    together, _ = score.batch_importance(model, {"input_ids": padded, "attention_mask": mask, **places})
    alone, _ = score.batch_importance(model, {"input_ids": ids})
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone))


def test_bfloat16_is_close_to_float32():
    inputs = inputs_for("gemma3")
    exact, _ = InformationFlowRoutes().batch_importance(load(tiny("gemma3")), inputs)
    rough, _ = InformationFlowRoutes().batch_importance(load(tiny("gemma3"), dtype="bfloat16"), inputs)
    assert abs(rough - exact).max() < 0.03 * exact.max()


def test_a_graph_is_kept_as_json_and_drawn(previous_token_model, tmp_path):
    ids = {"input_ids": torch.tensor([[5, 17, 33, 61, 80, 42]])}
    graph = InformationFlowRoutes(threshold=0.01).extract_ids(previous_token_model, ids, position=-2)
    assert graph.position == 4
    assert FlowGraph.from_json(graph.to_json(tmp_path / "graph.json")) == graph
    assert json.loads((tmp_path / "graph.json").read_text())["tokens"] == list(graph.tokens)
    figure = graph.plot(tmp_path / "graph.png")
    assert (tmp_path / "graph.png").stat().st_size > 5000
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == list(graph.tokens)
    with pytest.raises(InputError, match="no FlowGraph"):
        FlowGraph.from_json("[]")


def test_what_it_is_not_defined_for_is_refused():
    with pytest.raises(UnreadableModelError, match="attention interface"):
        flows_of(load(tiny("mpnet")), inputs_for("mpnet"))
    with pytest.raises(InputError, match="threshold"):
        InformationFlowRoutes(threshold=1.0)
    with pytest.raises(InputError, match="list of texts"):
        InformationFlowRoutes().score(load(tiny("bert")), [3])
    with pytest.raises(InputError, match="Token 9"):
        InformationFlowRoutes().extract_ids(load(tiny("bert")), {"input_ids": torch.tensor([[3, 4]])}, position=9)
    gated = load(tiny("gpt2"))
    with gated.tap_heads(lambda layer, z: 2 * z), pytest.raises(UnreadableModelError, match="after attention"):
        flows_of(gated, inputs_for("gpt2"))


def test_every_family_is_either_read_or_refused_here():
    assert set(READ) | {"falcon", "t5"} == set(FAMILIES)
    assert set(READ) >= VISION
    for family in ("falcon", "t5"):
        model = load(tiny(family), tower="encoder" if family == "t5" else None)
        with pytest.raises(UnreadableModelError, match="residual stream"), blocks(model, lambda block: None):
            model(**inputs_for(family))
