"""Parameters in embedding space: definitions in float64 with whole tables, and models whose answer is known."""

from __future__ import annotations

import pytest
import torch
from heads.by_hand_words import WORDS, next_word_model
from scipy.stats import pearsonr
from tiny import tiny
from torch import nn

from polyhead.errors import InputError
from polyhead.heads.embedding_alignment import align_layers, translate
from polyhead.heads.embedding_space import EmbeddingSpace, OVSharpness, top_entries
from polyhead.model import HeadedModel, load


def _language_model(family: str, **changes) -> HeadedModel:
    """A tiny language model with its unembedding, norms that are not the identity, weights of some size."""
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_config(tiny(family, **changes).config).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        scale = 0.3 if parameter.dim() == 1 else 0.1
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return load(module)


@pytest.mark.parametrize(
    ("n", "m", "k", "block"), [(50, 70, 9, 16), (50, 70, 5000, 16), (3, 4, 1, 2), (40, 40, 30, 99)]
)
def test_top_entries_are_those_of_the_whole_table(n, m, k, block):
    generator = torch.Generator().manual_seed(n)
    scale = torch.rand(n, 1, generator=generator).exp() ** 3  # blocks of small rows are skipped
    left, right = torch.randn(n, 6, generator=generator) * scale, torch.randn(m, 6, generator=generator)
    values, rows, columns = top_entries(left, right, k, block=block)
    table = left.double() @ right.double().T
    k = min(k, n * m)
    assert values.shape == (k,)
    assert torch.allclose(values.double(), table.flatten().topk(k).values, atol=1e-5)
    assert torch.allclose(table[rows, columns], values.double(), atol=1e-5)
    assert len({(int(r), int(c)) for r, c in zip(rows, columns, strict=True)}) == k


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_ov_table_is_what_a_head_does_to_a_state(family):
    """The entry of (s, t): the state E_s through gain, W_V, W_O, norm after, final gain and unembedding, in float64."""
    model = _language_model(family)
    space = EmbeddingSpace(model)
    module, head, layer = model.module, 3, 1
    e = space.embedding.double()
    if family == "gpt2":
        block = module.transformer.h[layer]
        x = (e - e.mean(1, keepdim=True)) * block.ln_1.weight.double()
        value = block.attn.c_attn.weight.double()[:, 64:].unflatten(1, (4, 8))[:, head]
        written = x @ value @ block.attn.c_proj.weight.double().unflatten(0, (4, 8))[head]
        final = (written - written.mean(1, keepdim=True)) * module.transformer.ln_f.weight.double()
    else:
        block, one = module.model.layers[layer], 1.0 if family == "gemma3" else 0.0
        x = e * (one + block.input_layernorm.weight.double())
        value = block.self_attn.v_proj.weight.double().unflatten(0, (2, 8))[head // 2].T
        written = x @ value @ block.self_attn.o_proj.weight.double().T.unflatten(0, (4, 8))[head]
        if family == "gemma3":
            written = written * (1 + block.post_attention_layernorm.weight.double())
        final = written * (one + module.model.norm.weight.double())
    table = final @ module.get_output_embeddings().weight.double().T
    pairs = space.ov_pairs(layer, head, k=20)
    assert torch.allclose(pairs.values.double(), table.flatten().topk(20).values, rtol=1e-4)
    assert torch.allclose(table[pairs.sources, pairs.targets], pairs.values.double(), rtol=1e-4)
    assert pairs.rms == pytest.approx(float(table.square().mean().sqrt()), rel=1e-4)
    some = space.ov_pairs(layer, head, k=5, sources=[4, 9, 11], targets=[2, 3])
    assert torch.allclose(some.values.double(), table[[4, 9, 11]][:, [2, 3]].flatten().topk(5).values, rtol=1e-4)
    assert torch.allclose(table[some.sources, some.targets], some.values.double(), rtol=1e-4)


def test_qk_pairs_are_the_scores_of_bare_embeddings_and_their_limits_are_said():
    """In layer 0, for tokens side by side, the model's own query-key scores; divide takes query-key norm in."""
    for family, divide in (("qwen3", True), ("gpt2", False)):
        model = _language_model(family)
        if family == "gpt2":
            model.module.transformer.wpe.weight.data.zero_()
        for name, parameter in model.module.named_parameters():
            if "attn" in name and name.endswith("bias"):
                parameter.data.zero_()
            if "ln_1.bias" in name:
                parameter.data.zero_()
        space, calls = EmbeddingSpace(model), {}
        ids = torch.arange(99)[:, None]  # one token a text: all at position 0, where a rotation is the identity
        with torch.no_grad(), model.tap_attention(lambda layer, call, calls=calls: calls.update({layer: call})):
            model(input_ids=ids)
        query, key = calls[0].query[:, 2, 0].double(), calls[0].key[:, 2 // (1 if family == "gpt2" else 2), 0].double()
        if not divide:  # the pre-norm's division by each token's size stays out of the weights
            e = space.embedding.double()
            size = (e.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            query, key = query * size, key * size
        table = query @ key.T
        pairs = space.qk_pairs(0, 2, k=20, divide=divide)
        assert torch.allclose(pairs.values.double(), table.flatten().topk(20).values, rtol=1e-3)
        assert torch.allclose(table[pairs.sources, pairs.targets], pairs.values.double(), rtol=1e-3)
        if divide:
            assert "query-key norm" in pairs.inexact
            assert "query-key norm" not in space.ov_pairs(0, 2).inexact
        else:
            assert pairs.inexact == ""
            with pytest.raises(InputError, match="no query-key norm"):
                space.qk_pairs(0, 2, divide=True)


def test_a_head_set_by_hand_is_read_as_what_it_does():
    """Head (1, 0) turns each word into the next of its list: its pairs are (word, next word), and it is sharpest."""
    model = next_word_model()
    space = EmbeddingSpace(model)
    pairs = space.ov_pairs(1, 0, k=20, sources=range(20))
    assert {(int(s), int(t)) for s, t in zip(pairs.sources, pairs.targets, strict=True)} == {
        (word, word + 1) for word in range(20)
    }
    assert ("Monday", "Tuesday") in pairs.words(model.tokenizer)
    assert ("one", "two") in pairs.words(model.tokenizer)
    found = OVSharpness(k=5, tokens=None).score(model)
    assert found.top(1) == [(1, 0)]
    assert found.values[1, 1] == 0  # a head that writes nothing
    # Memory 3 of layer 0 is the identity's: it is woken by word 3 and promotes it.
    reading = space.ffn(0, 3, k=2)
    assert reading.key[0][0] == reading.value[0][0] == 3
    assert reading.up is None
    assert WORDS[3] == "Thursday"


def test_memories_are_read_by_their_definition():
    model = _language_model("gemma3")
    space, mlp = EmbeddingSpace(model), model.module.model.layers[1]
    e, u = space.embedding.double(), model.module.get_output_embeddings().weight.double()
    gain = 1 + mlp.pre_feedforward_layernorm.weight.double()
    rows = {name: getattr(mlp.mlp, name).weight.double()[5] * gain for name in ("gate_proj", "up_proj")}
    wrote = mlp.mlp.down_proj.weight.double()[:, 5] * (1 + mlp.post_feedforward_layernorm.weight.double())
    wrote = wrote * (1 + model.module.model.norm.weight.double())
    reading = space.ffn(1, 5, k=99)
    for found, expected in (
        (reading.key, e @ rows["gate_proj"]),
        (reading.up, e @ rows["up_proj"]),
        (reading.value, u @ wrote),
    ):
        assert found is not None
        ids, values = zip(*found, strict=True)
        assert torch.allclose(torch.tensor(values).double(), expected[list(ids)], atol=1e-5)
        assert list(values) == sorted(values, reverse=True)


def _rotated() -> tuple[HeadedModel, HeadedModel, torch.Tensor]:
    """The same model in another basis of its stream (gains of 1), its memories in another order: equal in tokens."""
    first = _language_model("llama", tie_word_embeddings=True)
    for name, parameter in first.module.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
    import copy

    module = copy.deepcopy(first.module)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0]
    order = torch.randperm(37, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        module.model.embed_tokens.weight.copy_(module.model.embed_tokens.weight @ basis)
        for block in module.model.layers:
            for linear in block.modules():
                if isinstance(linear, nn.Linear):
                    writes = linear in (block.self_attn.o_proj, block.mlp.down_proj)
                    linear.weight.copy_(basis.T @ linear.weight if writes else linear.weight @ basis)
            for linear in (block.mlp.gate_proj, block.mlp.up_proj):
                linear.weight.copy_(linear.weight[order])
            block.mlp.down_proj.weight.copy_(block.mlp.down_proj.weight[:, order])
    second = load(module)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(first(input_ids=ids).logits, second(input_ids=ids).logits, atol=1e-4)
    return first, second, basis


@pytest.mark.parametrize("part", ["ffn-values", "ffn-keys", "query", "key", "value", "output"])
def test_layers_of_a_rotated_model_align_in_the_vocabulary_and_not_in_hidden_space(part):
    first, second, _ = _rotated()
    found = align_layers(first, second, part)
    assert found.matching() == [0, 1]
    assert found.values.diagonal() == pytest.approx(1.0, abs=1e-4)
    assert found.values[0, 1] < 0.9
    hidden = align_layers(first, second, part, space="hidden")
    assert hidden.values.max() < 0.9
    assert align_layers(first, first, part, space="hidden").values.diagonal() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(("part", "family"), [("ffn-values", "gpt2"), ("ffn-keys", "gemma3"), ("output", "gemma3")])
def test_alignment_is_the_best_pearson_correlation_over_tokens(part, family):
    first = _language_model(family)
    second = load(type(first.module)(first.module.config).eval())
    found = align_layers(first, second, part)
    said = []
    for space, layer in ((EmbeddingSpace(first), 0), (EmbeddingSpace(second), 1)):
        if part == "output":
            said.append(space.written(space.weights.layers[layer].output.flatten(0, 1)))
        elif part == "ffn-values":
            said.append(space.written(space.feedforward[layer].values()))
        else:
            said.append(space.read(space.feedforward[layer].keys()))
    table = torch.tensor([[pearsonr(x, y).statistic for y in said[1].numpy()] for x in said[0].double().numpy()])
    expected = torch.cat([table.amax(1), table.amax(0)])
    assert torch.allclose(torch.from_numpy(found.rows[0, 1]), expected.double(), atol=1e-4)
    assert found.values[0, 1] == pytest.approx(float(expected.mean()), abs=1e-4)


def test_translation_finds_the_rotation_and_keeps_what_readers_say():
    first, second, basis = _rotated()
    x, w = torch.randn(4, 32), torch.randn(3, 32)
    assert torch.allclose(translate(x, first, second), x @ basis, atol=1e-4)
    assert torch.allclose(translate(w, first, second, reads=True), w @ basis, atol=1e-4)
    wider = _language_model("llama", hidden_size=48)
    there = translate(x, first, wider)
    e, f = (EmbeddingSpace(model).embedding.double() for model in (first, wider))
    assert torch.allclose(there.double(), torch.linalg.lstsq(f, (x.double() @ e.T).T).solution.T, atol=1e-3)
    y = torch.randn(5, 48)
    assert torch.allclose(
        y @ translate(w, first, wider, reads=True).T, translate(y, wider, first) @ w.T, atol=1e-3, rtol=1e-3
    )


def test_what_cannot_be_read_is_refused():
    with pytest.raises(InputError, match="as wide as its stream"):
        EmbeddingSpace(load(tiny("albert")))
    with pytest.raises(InputError, match="as wide as its stream"):
        EmbeddingSpace(load(tiny("vit")))
    model = _language_model("gpt2")
    space = EmbeddingSpace(model)
    with pytest.raises(InputError, match="L2H0"):
        space.ov_pairs(2, 0)
    with pytest.raises(InputError, match="memories 0 to 127"):
        space.ffn(0, 128)
    with pytest.raises(InputError, match="one vocabulary"):
        align_layers(model, _language_model("llama", vocab_size=50))
    with pytest.raises(InputError, match="expected one of ffn-keys"):
        align_layers(model, model, "heads")
    with pytest.raises(InputError, match="has 32"):
        translate(torch.randn(2, 31), model, model)


def test_bf16_models_are_read_in_float32():
    model = _language_model("llama")
    expected = EmbeddingSpace(load(model.module.bfloat16().float())).ov_pairs(0, 1, k=10)
    found = EmbeddingSpace(load(model.module.bfloat16())).ov_pairs(0, 1, k=10)
    assert torch.allclose(found.values, expected.values, rtol=1e-4)
