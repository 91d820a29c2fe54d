"""Latent attention: exact at full rank, worse with every number less, the same step by step and absorbed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import inputs_for, tiny
from transformers import AutoModelForCausalLM, DynamicCache

import polyhead
from polyhead.compress import gqa_to_mla, is_gqa_representable, latent_factors, rope_contribution, to_mla
from polyhead.compress.mla import choose_pairs
from polyhead.errors import InputError, UnreadableModelError
from polyhead.model import HeadedModel


def lively(family: str, **changes: Any) -> HeadedModel:
    """A tiny model whose weights and biases are all large enough to matter."""
    model = tiny(family, **changes)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return polyhead.load(model)


def output(model: HeadedModel, family: str = "llama") -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_for(family)).last_hidden_state


def in_steps(model: HeadedModel, ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        found = [model(input_ids=each, past_key_values=cache).last_hidden_state for each in ids.split(pieces, 1)]
    return torch.cat(found, 1)


IDS = torch.randint(3, 98, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_mla_is_exact_at_full_rank_and_worse_with_every_number_less(family: str) -> None:
    model = lively(family)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    exact, report = to_mla(model)
    torch.testing.assert_close(output(exact, family), output(model, family), atol=1e-5, rtol=1e-5)
    assert report.parity < 1e-5
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())
    changes = [to_mla(model, rank)[1].change for rank in (2, 8, 16)]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > 0.05
    assert changes[-1] < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_mla_decodes_in_steps_absorbed_or_not_what_one_pass_gives(family: str) -> None:
    smaller, report = to_mla(lively(family), rank=12, rope_pairs=1)
    with torch.no_grad():
        whole = smaller(input_ids=IDS).last_hidden_state
    absorbed = in_steps(smaller, IDS, [5, 1, 2, 1])
    torch.testing.assert_close(absorbed, whole, atol=2e-5, rtol=1e-4)
    for layer in smaller.attention_layers:
        layer.module.absorbs = False
    explicit = in_steps(smaller, IDS, [5, 1, 2, 1])
    torch.testing.assert_close(absorbed, explicit, atol=2e-5, rtol=1e-4)
    assert report.after.cache_bytes_per_token == 2 * (12 + 2 * 2) * 4


def test_cache_holds_what_the_report_says() -> None:
    for convert in (lambda model: to_mla(model, 6, 2), gqa_to_mla):
        smaller, report = convert(lively("llama"))
        cache = DynamicCache(config=smaller.config)
        smaller(input_ids=IDS, past_key_values=cache)
        held = sum(each.numel() * each.itemsize for layer in cache.layers for each in (layer.keys, layer.values))
        assert held == IDS.numel() * report.after.cache_bytes_per_token


def test_partial_rotation_is_that_of_the_definition() -> None:
    """One layer in float64: kept pairs turn by their angle, others not at all."""
    model = polyhead.load(tiny("llama", num_hidden_layers=1).double())
    chosen = [torch.tensor([[0.0, 9.0, 1.0, 2.0], [3.0, 0.0, 5.0, 1.0]])]
    smaller, _ = to_mla(model, None, 2, select=chosen)
    kept = [[1, 3], [0, 2]]
    old, seen = model.attention_layers[0].module, {}
    handle = old.register_forward_hook(lambda module, args, kwargs, out: seen.update(kwargs, out=out), with_kwargs=True)
    model(input_ids=IDS)
    handle.remove()
    x = seen["hidden_states"]
    q, k, v = (getattr(old, f"{role}_proj")(x).unflatten(2, (-1, 8)).transpose(1, 2) for role in "qkv")
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    for states in (q, k):
        for head in range(4):
            for pair in kept[head // 2]:
                angle = torch.arange(9).double() * 10000.0 ** (-2 * pair / 8)
                turn = torch.polar(torch.ones(9).double(), angle)
                moved = torch.complex(states[:, head, :, pair], states[:, head, :, pair + 4]) * turn
                states[:, head, :, pair], states[:, head, :, pair + 4] = moved.real, moved.imag
    logits = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    expected = old.o_proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    new = smaller.attention_layers[0].module
    found = new(x, seen["position_embeddings"], None)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # the model's own angles are float32


def test_contribution_is_the_mean_product_of_lengths() -> None:
    model = lively("llama")
    calls: dict[int, Any] = {}
    with torch.no_grad(), model.tap_attention(lambda layer, call: calls.update({layer: (call.query, call.key)})):
        model(input_ids=IDS)
    found = rope_contribution(model, [{"input_ids": IDS[:1]}, {"input_ids": IDS[1:]}])
    q, k = calls[1]
    expected = torch.zeros(2, 4)
    for pair in range(4):
        for head in range(4):
            lengths = [
                states[:, at][..., [pair, pair + 4]].norm(dim=-1).flatten()
                for states, at in ((q, head), (k, head // 2))
            ]
            expected[head // 2, pair] += (lengths[0][:, None] * lengths[1]).mean() / 2
    torch.testing.assert_close(found[1], expected, atol=1e-5, rtol=1e-5)
    assert choose_pairs(found[1], 2, 2, 4).tolist() == [sorted(row.argsort()[-2:].tolist()) for row in expected]
    assert choose_pairs("low", 2, 1, 4).tolist() == [[2, 3]]


def test_joint_factors_are_the_best_of_their_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(20, 6, generator=generator), 3 * torch.randn(20, 10, generator=generator)
    both = torch.cat([keys, values], 1).double()
    sizes = torch.linalg.svdvals(both)
    lost = {}
    for kind in ("joint", "split"):
        down, up_keys, up_values = latent_factors(keys, values, 8, kind)
        lost[kind] = float((down @ torch.cat([up_keys, up_values], 1) - both).norm())
    assert lost["joint"] == pytest.approx(float(sizes[8:].norm()), rel=1e-6)
    assert lost["split"] > lost["joint"]
    down, up_keys, up_values = latent_factors(keys, values, 16, "split")
    torch.testing.assert_close(down @ up_keys, keys.double(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(down @ up_values, values.double(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("family", "balance"), [("qwen2", True), ("gemma3", False), ("gemma3", True)])
def test_transmla_changes_nothing_at_first(family: str, balance: bool) -> None:
    model = lively(family)
    same, report = gqa_to_mla(model, balance=balance)
    torch.testing.assert_close(output(same, family), output(model, family), atol=1e-5, rtol=1e-4)
    assert report.before.cache_bytes_per_token == report.after.cache_bytes_per_token
    with torch.no_grad():
        whole = same(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(in_steps(same, IDS, [5, 1, 2, 1]), whole, atol=2e-5, rtol=1e-4)
    assert all(is_gqa_representable(layer.module, 1e-5) for layer in same.attention_layers)
    if balance:
        layer = same.attention_layers[0].module
        lengths = torch.linalg.svdvals(layer.down_keys.weight), torch.linalg.svdvals(layer.up_keys.weight)
        torch.testing.assert_close(*lengths, atol=1e-5, rtol=1e-4)


def test_trained_copies_leave_what_groups_can_say() -> None:
    same, _ = gqa_to_mla(lively("llama"))
    before = output(same)
    optimizer = torch.optim.SGD([p for name, p in same.module.named_parameters() if ".up_" in name], 0.1)
    same(**inputs_for("llama")).last_hidden_state.square().sum().backward()
    optimizer.step()
    assert not any(is_gqa_representable(layer.module) for layer in same.attention_layers)
    assert not torch.allclose(output(same), before, atol=1e-4)
    with torch.no_grad():
        whole = same(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(in_steps(same, IDS, [4, 1, 4]), whole, atol=2e-5, rtol=1e-4)


def test_padded_texts_and_beams_generate_the_same() -> None:
    torch.manual_seed(0)
    config = tiny("llama").config
    stock = AutoModelForCausalLM.from_config(config).eval()
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "num_beams": 2}
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    expected = stock.generate(IDS, attention_mask=mask, **settings)
    for convert in (to_mla, gqa_to_mla):
        latent = convert(polyhead.load(stock))[0].module
        assert torch.equal(latent.generate(IDS, attention_mask=mask, **settings), expected)


def test_a_converted_model_is_kept_with_torch(tmp_path: Path) -> None:
    model = lively("llama")
    for convert in (lambda given: to_mla(given, 12, 2), gqa_to_mla):
        latent = convert(model)[0]
        torch.save(latent.module, tmp_path / "latent.pt")
        again = polyhead.load(torch.load(tmp_path / "latent.pt", weights_only=False))
        assert torch.equal(output(again), output(latent))


def test_other_models_are_refused() -> None:
    for family, message in (("gemma3", "normalises"), ("gemma2", "caps"), ("bert", "expected separate")):
        with pytest.raises(UnreadableModelError, match=message):
            to_mla(polyhead.load(tiny(family)))
    with pytest.raises(InputError, match="expected 1 to 28 numbers and 0 to 4 pairs"):
        to_mla(polyhead.load(tiny("llama")), rank=99, rope_pairs=1)
    with pytest.raises(InputError, match="Contributions of 1 layers"):
        to_mla(polyhead.load(tiny("llama")), 4, 1, select=[torch.ones(2, 4)])
    model, cache = polyhead.load(tiny("llama")), DynamicCache()
    model(input_ids=IDS, past_key_values=cache)
    latent = gqa_to_mla(model)[0]
    with pytest.raises(InputError, match="filled by another"):
        latent(input_ids=IDS, past_key_values=cache)
