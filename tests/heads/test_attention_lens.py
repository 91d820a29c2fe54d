"""Attention Lens: it finds the head that the prediction comes from, and its loss is the definition's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from tiny import _CONFIGS

from polyhead.errors import InputError
from polyhead.heads.attention_lens import AttentionLens, AttentionLensScore, LensSamples, collect
from polyhead.model import HeadedModel, load


def decoder() -> HeadedModel:
    torch.manual_seed(0)
    name, given = _CONFIGS["llama"]
    model = load(transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**given)).eval())

    def tokenize(texts, **_):
        rows = [[3 + ord(letter) % 90 for letter in text] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])  # padding on the left
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    model.tokenize = tokenize
    return model


def planted(n: int = 400) -> LensSamples:
    """Head (0, 0) holds the prediction, a linear map of what it writes; head (1, 2) writes noise."""
    generator = torch.Generator().manual_seed(0)
    written = torch.randn(2, n, 32, generator=generator)
    logits = written[0, :, :4] @ torch.randn(4, 20, generator=generator) + 1
    predicted = torch.log_softmax(logits, -1)
    return LensSamples([(0, 0), (1, 2)], written, predicted, torch.arange(20), np.arange(n))


@pytest.mark.parametrize("rank", [None, 8])
def test_lens_reads_the_head_the_prediction_comes_from(rank):
    samples, train, held = planted(), np.arange(300), np.arange(300, 400)
    lens = AttentionLens(decoder(), samples.heads, rank, steps=300).fit_samples(samples, train)
    found = lens.kl(samples, held).mean(1)
    p = samples.predicted.double().exp().numpy()
    unigram = (p[held] * (np.log(p[held]) - np.log(p[train].mean(0)))).sum(1).mean()
    assert found[0] < 0.25 * unigram
    assert found[1] > 0.9 * unigram


def test_kl_is_the_definition():
    samples = planted(40)
    lens = AttentionLens(decoder(), samples.heads, None, steps=3).fit_samples(samples)
    weight, bias = lens._parts[0].double().numpy(), lens.bias_.double().numpy()
    for head in range(2):
        a = samples.written[head].double().numpy() / float(lens._size[head])
        logits = a @ weight[head] + bias[head]
        q = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        p = samples.predicted.double().exp().numpy()
        assert np.allclose(lens.kl(samples)[head], (p * np.log(p / q)).sum(1), atol=1e-5)


def test_samples_are_what_heads_write_and_padding_changes_nothing():
    model, texts, heads = decoder(), ["abcdefg", "hij"], [(0, 3), (1, 0)]
    samples = collect(model, texts, heads, vocabulary=None, positions=1)
    for row, text in enumerate(texts):
        with model.record("heads") as recording, torch.no_grad():
            logits = model(**model.tokenize([text])).logits[0, -1]
        for which, (layer, head) in enumerate(heads):
            expected = recording.heads[0, layer, head, -1] @ model.output_weight(layer)[head]
            assert torch.allclose(samples.written[which, row], expected, atol=1e-5)
        assert torch.allclose(samples.predicted[row], torch.log_softmax(logits, -1), atol=1e-5)
    few = collect(model, texts, heads, vocabulary=3)
    assert len(few.tokens) == 3
    assert torch.allclose(few.predicted.exp().sum(-1), torch.ones(len(few.predicted)))


def test_score_gives_every_head_a_value_and_refuses_other_data():
    model = decoder()
    texts = ["abcabc", "bcdbcd", "cde", "defdef"]
    values = AttentionLensScore(rank=4, steps=5).score(model, texts).values
    assert values.shape == (2, 4)
    assert (values >= 0).all()
    with pytest.raises(InputError, match="four texts"):
        AttentionLensScore().score(model, texts[:2])
    with pytest.raises(InputError, match="layers 0 to 1"):
        AttentionLens(model, [(2, 0)])


@pytest.mark.parametrize("family", ["LlamaConfig", "Gemma3TextConfig"])
def test_logit_lens_is_what_the_head_adds_through_the_frozen_norms(family):
    model, texts, heads = decoder(), ["abcdefg", "hij"], [(0, 3), (1, 0)]
    if family != "LlamaConfig":
        torch.manual_seed(0)
        config = transformers.Gemma3TextConfig(**_CONFIGS["gemma3"][1])
        tokenize, model = model.tokenize, load(transformers.AutoModelForCausalLM.from_config(config).eval())
        model.tokenize = tokenize
    samples = collect(model, texts, heads, vocabulary=7, positions=1, direct=True)
    plain = collect(model, texts, heads, vocabulary=7, positions=1)
    assert torch.allclose(samples.written, plain.written, atol=1e-5)
    assert torch.allclose(samples.predicted, plain.predicted, atol=1e-5)
    inputs = model.tokenize(texts)
    seen = {}

    def catch(name, module):
        return module.register_forward_hook(lambda _, args, out: seen.update({name: (args[0][:, -1], out[:, -1])}))

    inner = model.module.model
    hooks = [catch("norm", inner.norm)]
    if family != "LlamaConfig":
        hooks += [catch(at, layer.post_attention_layernorm) for at, layer in enumerate(inner.layers)]
    with model.record("heads") as recording, torch.no_grad():
        logits = model(**inputs).logits[:, -1].double()
    for hook in hooks:
        hook.remove()
    unembedding = model.module.get_output_embeddings().weight.detach()[samples.tokens].double()
    for which, (layer, head) in enumerate(heads):
        state = (recording.heads[:, layer, head, -1] @ model.output_weight(layer)[head]).detach().double()
        for at in (layer, "norm"):  # an RMS norm at a recorded scale multiplies by its output over its input
            if at in seen:
                given, gave = seen[at]
                state = state * gave.double() / given.double()
        direct = state @ unembedding.T
        assert torch.allclose(samples.direct[which].double(), direct, atol=1e-4)
        p, q = (torch.softmax(each, -1) for each in (logits[:, samples.tokens], direct))
        assert np.allclose(samples.logit_lens()[which], (p * (p / q).log()).sum(-1).numpy(), atol=1e-4)
    with pytest.raises(InputError, match="direct=True"):
        plain.logit_lens()
