"""Weights by role: what they give is what the model's heads really work with, for every family."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, VISION, inputs_for, tiny, tower_of
from torch import nn

from polyhead.errors import InputError, UnreadableModelError
from polyhead.heads._probe import _linear_children
from polyhead.heads.weights import read_weights
from polyhead.model import HeadedModel, load


def _model(family: str, **changes) -> HeadedModel:
    module = tiny(family, **changes)
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():  # norms and biases that are not the identity
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return load(module, tower=tower_of(family))


def _entering(model: HeadedModel, layer: int, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters the attention module's projections, and the layer's head outputs."""
    at, seen, z = model.attention_layers[layer], {}, {}
    linear = _linear_children(at.module)[0]
    handle = linear.register_forward_pre_hook(lambda _, args: seen.setdefault("calls", []).append(args[0]))
    try:
        with torch.no_grad(), model.tap_heads(lambda index, given: z.update({index: given})):
            model(**inputs)
    finally:
        handle.remove()
    return seen["calls"][at.call], z[layer]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in VISION and family != "whisper"])
def test_one_token_alone_gives_its_value(family):
    """Attention over one token is 1, so what a head gives is the token's value: x W_V + b."""
    model = _model(family)
    weights = read_weights(model, fold=False, dtype=torch.float64)
    inputs = {"input_ids": inputs_for(family)["input_ids"][:1, -1:]}
    for layer in range(model.layers):
        x, z = _entering(model, layer, inputs)
        mine = weights.layers[layer].expanded()
        expected = torch.einsum("bti,hid->bthd", x.double(), mine.value) + mine.value_bias
        assert torch.allclose(z.double(), expected, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt-neox", "opt", "llama", "gemma2", "gemma3", "phi3", "vit", "t5", "bloom"]
)
def test_folded_weights_read_the_stream_before_the_norm(family):
    model = _model(family)
    plain, folded = (read_weights(model, fold=fold, dtype=torch.float64).layers[1] for fold in (False, True))
    block = next(m for _, m in model.module.named_modules() if isinstance(m, nn.ModuleList))[1]
    norm = next(m for n, m in block.named_modules() if ("norm" in n.lower() or n == "ln_1") and "attn." not in n)
    x = torch.randn(5, plain.query.shape[1], dtype=torch.float64)
    centred = "LayerNorm" in type(norm).__name__ and family != "t5"
    size = (x - x.mean(-1, keepdim=True) if centred else x).square().mean(-1, keepdim=True).sqrt()
    normed = norm.double()(x)
    for role in ("query", "key", "value"):
        before = normed @ getattr(plain, role) + getattr(plain, f"{role}_bias")[:, None]
        after = (x / size) @ getattr(folded, role) + getattr(folded, f"{role}_bias")[:, None]
        assert torch.allclose(before, after, rtol=1e-3, atol=1e-4)


def test_gain_of_a_norm_after_the_output_is_part_of_what_is_written():
    model = _model("gemma3")
    plain, folded = (read_weights(model, fold=fold, dtype=torch.float64).layers[0] for fold in (False, True))
    norm = model.module.layers[0].post_attention_layernorm
    assert torch.allclose(folded.output, plain.output * (1 + norm.weight.double()))


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "qwen3", "gemma3", "llama", "bert"])
def test_queries_and_keys_are_those_of_the_attention_call_at_position_zero(family):
    """A rotation by position is the identity at position 0; a query-key norm only divides by the size."""
    model = _model(family)
    seen: dict = {}
    inputs = {"input_ids": inputs_for(family)["input_ids"][:1]}
    with torch.no_grad(), model.tap_attention(lambda layer, call: seen.update({layer: (call.query, call.key)})):
        model(**inputs)
    x, _ = _entering(model, 1, inputs)
    layer = read_weights(model, fold=False, dtype=torch.float64).layers[1]
    for role, got in zip(("query", "key"), seen[1], strict=True):
        mine = torch.einsum("i,hid->hd", x[0, 0].double(), getattr(layer, role)) + getattr(layer, f"{role}_bias")
        cosine = torch.nn.functional.cosine_similarity(mine, got[0, :, 0].double(), dim=-1)
        assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-6)


def test_what_is_inexact_is_said():
    assert read_weights(_model("gpt2")).inexact == ""
    assert "query-key norm" in read_weights(_model("gemma3")).inexact
    assert "rotated" in read_weights(_model("llama")).inexact
    assert "not recognised" not in read_weights(_model("qwen3")).inexact
    assert "residual sum" in read_weights(_model("bert")).inexact


def test_values_that_do_not_follow_from_the_projections_are_refused():
    module = tiny("gpt2")
    model = load(module)
    for block in module.h:  # what is put through c_attn is no longer what its weights say
        block.attn.c_attn.register_forward_hook(lambda _, args, out: out.flip(-1))
    with pytest.raises(UnreadableModelError, match="cut"):
        read_weights(model)


def test_unembedding_is_the_tied_embedding_or_refused():
    assert read_weights(_model("gpt2")).unembedding is not None
    with pytest.raises(InputError, match="lm_head"):
        read_weights(_model("bert")).require_unembedding()


def test_logits_are_the_models_own_up_to_the_size_of_the_state():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)).eval()
    nn.init.normal_(module.transformer.ln_f.weight)
    weights = read_weights(load(module))
    x = torch.randn(3, 16)
    own = module.lm_head(module.transformer.ln_f(x)) - module.lm_head(module.transformer.ln_f.bias)
    size = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()
    assert torch.allclose(own, weights.to_logits(x / size), atol=1e-4)


def test_bf16_model_is_read_in_float32():
    weights = read_weights(load(_model("llama").module.bfloat16()))
    assert weights.layers[0].query.dtype == torch.float32
