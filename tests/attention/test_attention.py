"""Plain, grouped, cosine and linear attention against their definitions, and inside stock models."""

from __future__ import annotations

import pytest
import torch

import polyhead
from polyhead.attention import (
    Attention,
    AttentionShape,
    GroupedQueryAttention,
    LinearAttention,
    QKNormAttention,
    causal_linear,
    register,
    replaced,
)
from polyhead.errors import InputError
from polyhead.heads.weights import read_weights
from polyhead.positions import RotaryPositions
from tests.attention.cases import Case
from tests.tiny import tiny

SHAPE = AttentionShape(32, 4, bias=True)
GROUPS = AttentionShape(32, 4, kv_heads=2)
CASES = {
    "mha": Case(lambda causal: Attention(SHAPE, causal=causal)),
    "mha-rotary": Case(lambda causal: Attention(GROUPS, causal=causal, positions=RotaryPositions(8))),
    "gqa": Case(lambda causal: GroupedQueryAttention(GROUPS, causal=causal)),
    "mqa": Case(lambda causal: GroupedQueryAttention(AttentionShape(32, 4, kv_heads=1, head_dim=6), causal=causal)),
    "qknorm": Case(lambda causal: QKNormAttention(GROUPS, causal=causal, length=64, per_head=True)),
    "linear": Case(lambda causal: LinearAttention(GROUPS, causal=causal)),
}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def by_definition(layer: Attention, hidden: torch.Tensor, causal: bool) -> torch.Tensor:
    """Softmax attention token by token and head by head, keys shared by groups."""
    shape = layer.shape
    assert shape is not None
    size, group = shape.size, shape.heads // shape.groups_of
    out = torch.zeros_like(hidden)
    for b in range(hidden.shape[0]):
        for t in range(hidden.shape[1]):
            seen = hidden[b, : t + 1] if causal else hidden[b]
            heads = []
            for h in range(shape.heads):
                own, kv = slice(h * size, (h + 1) * size), h // group
                shared = slice(kv * size, (kv + 1) * size)
                q = layer.q_proj(hidden[b, t])[own]
                k, v = layer.k_proj(seen)[:, shared], layer.v_proj(seen)[:, shared]
                e = torch.exp(k @ q / size**0.5)
                heads.append((e / e.sum()) @ v)
            out[b, t] = layer.o_proj(torch.cat(heads))
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_attention_by_definition(causal: bool, kv_heads: int) -> None:
    layer = GroupedQueryAttention(AttentionShape(32, 4, kv_heads), causal=causal).double()
    hidden = randn(2, 5, 32)
    assert torch.allclose(layer(hidden), by_definition(layer, hidden, causal), atol=1e-10)


def test_weights_are_those_of_the_fused_kernel() -> None:
    layer, hidden = Attention(GROUPS, causal=True).double(), randn(2, 6, 32)
    weights = layer.attention_weights(hidden)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))
    values = layer.split(layer.v_proj(hidden)).repeat_interleave(2, 1)
    assert torch.allclose(weights @ values, layer.heads_of(hidden), atol=1e-10)


def test_rotary_angles_are_those_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8)
    q, k = randn(1, 4, 9, 8).float(), randn(1, 4, 9, 8).float()
    cos, sin = LlamaRotaryEmbedding(config)(q, torch.arange(9)[None])
    layer = Attention(SHAPE, positions=RotaryPositions(8))
    _, _, _, call = layer._prepared(torch.zeros(1, 9, 32), None)
    for own, theirs in zip(layer.position(q, k, call), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert torch.allclose(own, theirs, atol=1e-5)


def test_cosine_logits_by_definition() -> None:
    layer = QKNormAttention(SHAPE, length=16).double()
    hidden = randn(1, 5, 32)
    q, k = layer.split(layer.q_proj(hidden)), layer.split(layer.k_proj(hidden))
    weights = layer.attention_weights(hidden)
    gain = torch.log2(torch.tensor(16.0**2 - 16, dtype=torch.float64))
    for h in range(4):
        for i in range(5):
            cosine = torch.nn.functional.cosine_similarity(q[0, h, i][None], k[0, h])
            assert torch.allclose(weights[0, h, i], (gain * cosine).softmax(0), atol=1e-6)


@pytest.mark.parametrize("rates", [None, (1.0, 0.9, 0.5, 0.05)])
@pytest.mark.parametrize("block", [1, 4, 64])
def test_linear_recurrence_in_any_blocks(rates: tuple[float, ...] | None, block: int) -> None:
    q, k, v = randn(2, 4, 13, 5), randn(2, 4, 13, 5) ** 2, randn(2, 4, 13, 3)
    decay = None if rates is None else torch.tensor(rates, dtype=torch.float64)
    state, wanted = torch.zeros(2, 4, 5, 3, dtype=torch.float64), []
    for t in range(13):
        kept = state if decay is None else decay[:, None, None] * state
        state = kept + k[:, :, t, :, None] * v[:, :, t, None, :]
        wanted.append((q[:, :, t, None, :] @ state)[:, :, 0])
    out, last = causal_linear(q, k, v, decay, block)
    assert torch.allclose(out, torch.stack(wanted, 2), atol=1e-9)
    assert torch.allclose(last, state, atol=1e-9)


def test_linear_weights_are_what_mixes() -> None:
    for causal in (True, False):
        layer, hidden = LinearAttention(SHAPE, causal=causal).double(), randn(1, 7, 32)
        values = layer.split(layer.v_proj(hidden))
        assert torch.allclose(layer.attention_weights(hidden) @ values, layer.heads_of(hidden), atol=1e-8)


def test_state_of_a_linear_layer_does_not_grow() -> None:
    layer = LinearAttention(SHAPE, causal=True)
    _, few = layer.step(torch.randn(1, 3, 32))
    _, many = layer.step(torch.randn(1, 300, 32))
    assert few.bytes == many.bytes == layer.cache_bytes(300, itemsize=4)


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit", "whisper"])
def test_taking_a_layers_place_changes_nothing(family: str) -> None:
    model = polyhead.load(tiny(family, "eager").eval())
    weights = read_weights(model, fold=False)
    inputs = _inputs(model, family)
    with torch.no_grad():
        wanted = model(**inputs)[0]
        own = Attention.from_mha(weights.layers[1], causal=family == "gpt2").eval()
        with replaced(model, {1: own}):
            found = model(**inputs)[0]
        broken = Attention.from_mha(weights.layers[1], causal=family == "gpt2").eval()
        broken.v_proj.weight.data.mul_(-1)
        with replaced(model, {1: broken}):
            other = model(**inputs)[0]
        after = model(**inputs)[0]
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(other, wanted, atol=1e-3)
    assert torch.equal(after, wanted)


def test_taking_places_honours_padding() -> None:
    model = polyhead.load(tiny("bert").eval())
    layers = {at: Attention.from_mha(layer) for at, layer in enumerate(read_weights(model, fold=False).layers)}
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 8, 7, 6, 5, 4]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6])
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask)[0]
        with replaced(model, layers):
            found = model(input_ids=ids, attention_mask=mask)[0]
    assert torch.allclose(found[mask.bool()], wanted[mask.bool()], atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama", "gemma3", "vit"])
def test_registered_with_transformers(family: str) -> None:
    module = tiny(family).eval()
    inputs = _inputs(polyhead.load(module), family)
    with torch.no_grad():
        wanted = module(**inputs)[0]
        module.set_attn_implementation(register(Attention(None), "polyhead_test"))
        found = module(**inputs)[0]
    assert torch.allclose(found, wanted, atol=1e-5)


def test_what_cannot_be_registered_or_made_is_refused() -> None:
    with pytest.raises(InputError, match="shape=None"):
        register(Attention(SHAPE))
    with pytest.raises(InputError, match="divides"):
        AttentionShape(32, 4, kv_heads=3)
    with pytest.raises(InputError, match="divide the features"):
        AttentionShape(33, 4)
    model = polyhead.load(tiny("bert"))
    with pytest.raises(InputError, match="0 to 1"), replaced(model, {2: Attention(SHAPE)}):
        pass


def test_grouped_from_a_trained_layer() -> None:
    model = polyhead.load(tiny("bert"))
    trained = read_weights(model, fold=False).layers[0]
    hidden = torch.randn(1, 5, 32)
    same = GroupedQueryAttention.from_mha(trained)
    assert torch.allclose(same(hidden), Attention.from_mha(trained)(hidden), atol=1e-6)
    half = GroupedQueryAttention.from_mha(trained, kv_heads=2)
    want = (trained.key[0] + trained.key[1]) / 2
    assert torch.allclose(half.k_proj.weight[:8].T, want, atol=1e-6)
    with pytest.raises(InputError, match="divides the 4"):
        GroupedQueryAttention.from_mha(trained, kv_heads=3)


def _inputs(model: polyhead.HeadedModel, family: str) -> dict[str, torch.Tensor]:
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
    if family == "whisper":
        return {"input_features": torch.randn(2, 80, 40, generator=torch.Generator().manual_seed(1))}
    return {"input_ids": torch.arange(3, 19).reshape(2, 8)}
