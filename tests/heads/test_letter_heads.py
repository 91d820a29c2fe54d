"""Letter heads: attribution sums to the logits, planted patterns are named, and full rank changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from polyhead.errors import InputError
from polyhead.heads.letter_heads import Choices, SubspaceCompressor, letter_attribution, letter_heads
from polyhead.heads.logit_lens import LogitLens
from polyhead.model import HeadedModel, load


def _choices(n: int = 5) -> Choices:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 20, (n, 7), generator=generator)
    labels = torch.arange(20, 23).expand(n, -1)
    places = torch.arange(6).reshape(1, 3, 2).expand(n, -1, -1)
    return Choices({"input_ids": ids}, labels, places, torch.randint(0, 3, (n,), generator=generator))


def _decoder(kind: str = "gpt2") -> HeadedModel:
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=30, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        return load(GPT2LMHeadModel(config).eval())
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return load(LlamaForCausalLM(LlamaConfig(vocab_size=30, head_dim=8, intermediate_size=37, **shape)).eval())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_attribution_is_the_lens_taken_prompt_by_prompt(kind: str) -> None:
    model, choices = _decoder(kind), _choices()
    found = letter_attribution(model, choices)
    heads, feed, logits = np.zeros((2, 4)), np.zeros(2), 0.0
    for row in range(5):
        parts = LogitLens(model).parts(choices.inputs, row, -1, [20, 21, 22])
        weight = torch.full((3,), -0.5)
        weight[choices.right[row]] = 1
        heads += (parts.heads @ weight).numpy() / 5
        feed += (parts.feedforward @ weight).numpy() / 5
        logits += float((parts.logits - parts.embedding - parts.bias) @ weight) / 5
    np.testing.assert_allclose(found.heads.values, heads, atol=1e-4)
    np.testing.assert_allclose(found.feedforward, feed, atol=1e-4)
    assert found.heads.values.sum() + found.feedforward.sum() == pytest.approx(logits, abs=1e-3)


def test_shares_are_the_attention_of_the_last_token() -> None:
    model, choices = _decoder(), _choices()
    found = letter_heads(model, choices)
    with model.record("attention") as recording, torch.no_grad():
        model(**choices.inputs)
    for layer in range(2):
        last = recording.layer_attention(layer)[:, :, -1].double()
        mass = torch.stack([last[..., 2 * i : 2 * i + 2].sum(-1) for i in range(3)], -1)
        share = mass / mass.sum(-1, keepdim=True)
        right = torch.stack([share[row, :, choices.right[row]] for row in range(5)]).mean(0)
        np.testing.assert_allclose(found.right[layer], right.numpy(), atol=1e-6)
        np.testing.assert_allclose(found.own[layer], last[..., -1].mean(0).numpy(), atol=1e-6)


def test_planted_heads_are_named() -> None:
    model = load(tiny("gpt2", n_embd=32, n_layer=1, n_head=4))
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.module.wte.weight[:8, :8] = torch.eye(8)
        attention = model.module.h[0].attn.c_attn
        attention.weight[:8, 32:64] = torch.eye(8).repeat(1, 4)  # every head's key is the token
        attention.weight[:8, :8] = 30 * torch.eye(8)  # head 0 asks for the token itself, that is, the item named again
        attention.bias[8 + 1] = 60.0  # head 1 for token 1
        attention.bias[24 + 7], attention.bias[24 + 6] = 60.0, 60.0  # head 3 for what stands last
    # Items are the tokens 0 to 2; the right one is named again where heads 0 and 1 are tried.
    ids = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1], [0, 1, 2, 2]])
    places = torch.arange(3).reshape(1, 3, 1).expand(3, -1, -1)
    found = letter_heads(model, Choices({"input_ids": ids}, ids[:, :3], places, torch.arange(3)), bound=0.3)
    assert found.kinds[0][:3] == ["correct letter", "single letter", "uniform"]
    other = torch.tensor([[0, 1, 2, 7], [0, 1, 2, 6]])
    ending = letter_heads(model, Choices({"input_ids": other}, other[:, :3], places[:2], torch.arange(2)))
    assert ending.of_kind("amplification") == [(0, 0), (0, 3)]


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_full_rank_changes_nothing_and_rank_zero_is_the_mean(which: str, kind: str) -> None:
    model, choices = _decoder(kind), _choices()
    compressor = SubspaceCompressor([(0, 1), (1, 3)], which, 8).fit(model, choices)  # type: ignore[arg-type]
    plain = model(**choices.inputs).logits.detach()
    with compressor.on(model, choices):
        same = model(**choices.inputs).logits.detach()
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=1e-4)
    assert compressor.loss_recovered(model, choices) == pytest.approx(1, abs=1e-3)
    compressor.rank = 0
    seen = []

    def keep(layer: int, call: object) -> None:
        if layer == 0:
            seen.append({"q": call.query, "k": call.key, "v": call.value}[which])  # type: ignore[attr-defined]

    with torch.no_grad(), compressor.on(model, choices), model.tap_attention(keep):
        model(**choices.inputs)
    slot = 1 if which == "q" or kind == "gpt2" else 0  # query heads 0 and 1 share a key-value head of the Llama
    at = seen[0][:, slot, -1:] if which == "q" else seen[0][:, slot, :6]
    torch.testing.assert_close(at, at.flatten(0, 1).mean(0).expand_as(at))
    assert compressor.loss_recovered(model, choices) == pytest.approx(0, abs=1e-9)
    assert compressor.rank == 0


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(InputError, match="expected 'q', 'k' or 'v'"):
        SubspaceCompressor([(0, 0)], "o")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="call fit"), SubspaceCompressor([(0, 0)]).on(_decoder(), _choices()):
        pass
