"""Pruned models equal gated ones, are smaller by what the definition says, and are files that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import FAMILIES, inputs_for, tiny, tower_of

import polyhead
from polyhead import HeadMap
from polyhead.act import Gate
from polyhead.compress import cost_of, prune, save_pruned
from polyhead.errors import InputError, UnreadableModelError
from polyhead.model import HeadedModel

REFUSED = {"mpnet", "albert", "gpt-neox", "phi3", "falcon", "bloom", "t5"}
HEADS = [(0, 0), (0, 1), (0, 2), (1, 1)]


def output(model: HeadedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in REFUSED])
def test_pruned_equals_gated_and_the_original_is_untouched(family: str) -> None:
    model, inputs = polyhead.load(tiny(family), tower=tower_of(family)), inputs_for(family)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    plain = output(model, inputs)
    with Gate.off(HEADS, model).on(model):
        gated = output(model, inputs)
    smaller, report = prune(model, HEADS)
    torch.testing.assert_close(output(smaller, inputs), gated, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(gated, plain, atol=1e-4)
    assert report.parity < 1e-5
    assert report.removed == HEADS
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())
    counted = sum(parameter.numel() for parameter in smaller.module.parameters())
    assert report.after.parameters == counted < report.before.parameters


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_models_that_cannot_be_cut_are_refused(family: str) -> None:
    with pytest.raises((UnreadableModelError, InputError), match=r"cannot be cut|shares its weights"):
        prune(polyhead.load(tiny(family)), HEADS)


def test_what_goes_is_exactly_rows_columns_and_their_biases() -> None:
    model = polyhead.load(tiny("bert"))
    attention = model.attention_layers[1].module
    smaller, report = prune(model, [(1, 2)])
    cut, kept = smaller.attention_layers[1], [*range(16), *range(24, 32)]
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(cut.module, name).weight, getattr(attention, name).weight[kept])
        assert torch.equal(getattr(cut.module, name).bias, getattr(attention, name).bias[kept])
    assert torch.equal(cut.output_projection.weight, model.attention_layers[1].output_projection.weight[:, kept])
    assert report.before.parameters - report.after.parameters == 4 * 8 * 32 + 3 * 8
    # Linear work: two operations a weight; attention over 128 tokens: four a feature of a head.
    assert report.before.flops_per_token - report.after.flops_per_token == 2 * 4 * 8 * 32 + 4 * 128 * 8


def test_key_value_heads_go_with_their_last_query_head() -> None:
    model = polyhead.load(tiny("llama"))  # query heads 0 and 1 share a key-value head, 2 and 3 the other
    smaller, report = prune(model, [(0, 2), (0, 3)])
    assert [(layer.heads, layer.kv_heads) for layer in smaller.attention_layers] == [(2, 1), (4, 2)]
    assert report.padded == []
    assert report.before.cache_bytes_per_token - report.after.cache_bytes_per_token == 2 * 8 * 4
    one_each, report = prune(model, [(0, 0), (0, 3)])
    assert [(layer.heads, layer.kv_heads) for layer in one_each.attention_layers] == [(2, 2), (4, 2)]
    assert report.padded == []
    uneven, report = prune(model, [(0, 0)])
    assert [(layer.heads, layer.kv_heads) for layer in uneven.attention_layers] == [(4, 2), (4, 2)]
    assert report.padded == [(0, 0)]


def test_a_layer_without_heads_and_pruning_twice() -> None:
    model, inputs = polyhead.load(tiny("bert")), inputs_for("bert")
    all_gone = [(0, head) for head in range(4)] + [(1, 3)]
    with Gate.off(all_gone, model).on(model):
        gated = output(model, inputs)
    once, report = prune(model, all_gone)
    torch.testing.assert_close(output(once, inputs), gated, atol=1e-5, rtol=1e-5)
    assert report.padded == [(0, 0)]
    first, _ = prune(model, [(0, 1), (1, 3)])
    twice, report = prune(first, [(0, 0), (0, 1), (0, 2)])  # what is left of layer 0
    torch.testing.assert_close(output(twice, inputs), gated, atol=1e-5, rtol=1e-5)
    assert report.removed == sorted(all_gone)


def test_gradients_and_training_go_on() -> None:
    smaller, _ = prune(polyhead.load(tiny("gpt2")), HEADS)
    smaller(**inputs_for("gpt2")).last_hidden_state.pow(2).sum().backward()
    projection = smaller.attention_layers[0].output_projection
    assert float(projection.weight.grad.abs().sum()) > 0


def _saved(model: torch.nn.Module, folder: Path) -> HeadedModel:
    model.save_pretrained(folder)
    return polyhead.load(folder)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_saved_folder_is_stock_for_transformers_and_small_for_polyhead(family: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    model, inputs = _saved(tiny(family), tmp_path / "stock"), inputs_for(family)
    smaller, report = prune(model, [(0, 2), (0, 3), (1, 1)])
    save_pruned(smaller, tmp_path / "pruned")
    stock = AutoModel.from_pretrained(tmp_path / "pruned")
    assert sum(p.numel() for p in stock.parameters()) == report.before.parameters
    expected = output(smaller, inputs)
    torch.testing.assert_close(stock(**inputs).last_hidden_state.detach(), expected, atol=1e-5, rtol=1e-5)
    again = polyhead.load(tmp_path / "pruned")
    assert [layer.heads for layer in again.attention_layers] == [layer.heads for layer in smaller.attention_layers]
    torch.testing.assert_close(output(again, inputs), expected, atol=1e-6, rtol=1e-6)
    more, report = prune(again, [(1, 0)])
    assert report.removed == [(0, 2), (0, 3), (1, 0), (1, 1)] if family != "llama" else (1, 0) in report.removed
    assert output(more, inputs).isfinite().all()


def test_equal_layers_with_a_stated_head_size_are_saved_small(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = _saved(tiny("llama"), tmp_path / "stock")
    smaller, report = prune(model, [(0, 2), (0, 3), (1, 0), (1, 1)])
    save_pruned(smaller, tmp_path / "pruned")
    assert not (tmp_path / "pruned" / "polyhead_pruned.json").exists()
    stock = AutoModel.from_pretrained(tmp_path / "pruned")
    assert sum(p.numel() for p in stock.parameters()) == report.after.parameters
    inputs = inputs_for("llama")
    torch.testing.assert_close(stock(**inputs).last_hidden_state.detach(), output(smaller, inputs))


def test_a_damaged_list_of_heads_is_named(tmp_path: Path) -> None:
    model = _saved(tiny("bert"), tmp_path / "stock")
    save_pruned(prune(model, [(0, 1)])[0], tmp_path / "pruned")
    file = tmp_path / "pruned" / "polyhead_pruned.json"
    plain = json.loads(file.read_text())
    for text, message in (("{", "does not list"), (json.dumps({**plain, "version": 9}), "version 9")):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            polyhead.load(tmp_path / "pruned")


def test_masks_maps_and_wrong_heads() -> None:
    model = polyhead.load(tiny("bert"))
    importance = HeadMap(np.arange(8.0).reshape(2, 4), "importance")
    assert prune(model, (-importance).mask(2))[1].removed == [(0, 0), (0, 1)]
    with pytest.raises(InputError, match="No head to prune"):
        prune(model, [])
    with pytest.raises(InputError, match="Head 4 of layer 0"):
        prune(model, [(0, 4)])


def test_shared_layers_lose_the_same_heads() -> None:
    model, inputs = polyhead.load(tiny("albert")), inputs_for("albert")
    heads = [(0, 1), (1, 1)]
    with Gate.off(heads, model).on(model):
        gated = output(model, inputs)
    torch.testing.assert_close(output(prune(model, heads)[0], inputs), gated, atol=1e-5, rtol=1e-5)


def test_cost_counts_linear_work_and_attention() -> None:
    model = polyhead.load(tiny("llama"))
    inside = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 37)
    assert cost_of(model, context=10).flops_per_token == 2 * inside + 2 * 4 * 10 * 32
    assert cost_of(model).cache_bytes_per_token == 2 * 2 * 2 * 8 * 4
    assert cost_of(polyhead.load(tiny("bert"))).cache_bytes_per_token == 0


@pytest.mark.real_model
def test_real_encoder_with_a_fifth_of_its_heads_gone(minilm_path: str, tmp_path: Path) -> None:
    model = polyhead.load(minilm_path)
    rng = np.random.default_rng(0)
    mask = np.zeros(72, dtype=bool)
    mask[rng.choice(72, 14, replace=False)] = True
    smaller, report = prune(model, mask.reshape(6, 12))
    assert report.before.parameters - report.after.parameters == 14 * (4 * 32 * 384 + 3 * 32)
    again = polyhead.load(save_pruned(smaller, tmp_path / "small"))
    inputs = again.tokenize(["a saved model keeps its tokenizer"])
    torch.testing.assert_close(output(again, inputs), output(smaller, inputs))
