"""Key-value heads pooled by the definition, in every family that counts them; the saved folder is stock."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import inputs_for, tiny

import polyhead
from polyhead.compress import alike_groups, convert_to_gqa, pool_heads, tie_key_values
from polyhead.errors import InputError, UnreadableModelError
from polyhead.model import HeadedModel

WIDE = {"num_key_value_heads": 4}


def output(model: HeadedModel | torch.nn.Module, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs_for(family)).last_hidden_state


@pytest.mark.parametrize(
    ("family", "grouping"),
    [
        ("llama", "alike"),
        ("qwen2", "alike"),
        ("qwen3", "neighbours"),
        ("gemma3", "alike"),
        ("phi3", "alike"),
    ],
)
def test_saved_folder_is_loaded_by_transformers_with_the_same_outputs(
    family: str, grouping: str, tmp_path: Path
) -> None:
    from transformers import AutoModel

    model = polyhead.load(tiny(family, **WIDE))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    smaller, report = convert_to_gqa(model, 2, grouping=grouping)
    assert [layer.kv_heads for layer in smaller.attention_layers] == [2, 2]
    assert [layer.kv_heads for layer in model.attention_layers] == [4, 4]
    assert report.parity < 1e-5
    assert report.before.cache_bytes_per_token == 2 * report.after.cache_bytes_per_token > 0
    tied, lossy = tie_key_values(model, 2, grouping=grouping)
    torch.testing.assert_close(output(smaller, family), output(tied, family), atol=1e-5, rtol=1e-5)
    assert report.change == pytest.approx(lossy.change, abs=1e-5)
    assert report.change > 1e-3
    smaller.module.save_pretrained(tmp_path)
    stock = AutoModel.from_pretrained(tmp_path)
    assert stock.config.num_key_value_heads == 2
    assert torch.equal(output(stock, family), output(smaller, family))
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())


def test_weights_are_the_groups_means_and_query_heads_follow() -> None:
    model = polyhead.load(tiny("qwen2", **WIDE))
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    old = model.attention_layers[1].module
    new = convert_to_gqa(model, 2)[0].attention_layers[1].module
    for name in ("k_proj", "v_proj"):
        for part in ("weight", "bias"):
            heads = getattr(getattr(old, name), part).double().unflatten(0, (4, 8))
            expected = torch.stack([(heads[0] + heads[1]) / 2, (heads[2] + heads[3]) / 2]).flatten(0, 1)
            torch.testing.assert_close(getattr(getattr(new, name), part).double(), expected)
    assert torch.equal(new.q_proj.weight, old.q_proj.weight)
    alike, report = convert_to_gqa(model, 2, grouping="alike", pool="first")
    order = [head for group in report.details["groups"][1] for head in group]
    moved = alike.attention_layers[1].module
    assert torch.equal(moved.q_proj.weight.unflatten(0, (4, 8)), old.q_proj.weight.unflatten(0, (4, 8))[order])
    assert torch.equal(moved.o_proj.weight.unflatten(1, (4, 8)), old.o_proj.weight.unflatten(1, (4, 8))[:, order])


def test_as_many_heads_as_before_is_exact_and_heads_that_are_equal_lose_nothing() -> None:
    model = polyhead.load(tiny("llama", **WIDE))
    same, report = convert_to_gqa(model, 4)
    assert torch.equal(output(same, "llama"), output(model, "llama"))
    assert report.change == 0
    for pool in ("mean", "first"):
        tied = tie_key_values(model, 1, pool=pool)[0]
        multi_query, report = convert_to_gqa(tied, 1)
        torch.testing.assert_close(output(multi_query, "llama"), output(tied, "llama"), atol=1e-6, rtol=1e-5)
        assert report.change < 1e-5
        assert report.before.cache_bytes_per_token == 4 * report.after.cache_bytes_per_token


def test_what_is_decoded_step_by_step_is_what_one_pass_gives_and_it_trains() -> None:
    from transformers import DynamicCache

    smaller, report = convert_to_gqa(polyhead.load(tiny("llama", **WIDE)), 1)
    ids = torch.randint(3, 98, (1, 9), generator=torch.Generator().manual_seed(0))
    whole = smaller(ids).last_hidden_state
    cache, found = DynamicCache(config=smaller.config), []
    with torch.no_grad():
        for piece in ids.split([5, 1, 3], 1):
            found.append(smaller(piece, past_key_values=cache).last_hidden_state)
    torch.testing.assert_close(torch.cat(found, 1), whole.detach(), atol=1e-5, rtol=1e-5)
    held = sum(each.numel() * each.itemsize for layer in cache.layers for each in (layer.keys, layer.values))
    assert held == 9 * report.after.cache_bytes_per_token
    whole.square().sum().backward()
    assert all(layer.module.k_proj.weight.grad.abs().sum() > 0 for layer in smaller.attention_layers)


def test_alike_heads_are_found_whatever_their_order() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(3, 40, generator=generator)
    order = torch.tensor([2, 0, 1, 1, 2, 0, 0, 2, 1])
    heads = kinds[order] + 0.1 * torch.randn(9, 40, generator=generator)
    assert alike_groups(heads, 3) == [[0, 4, 7], [1, 5, 6], [2, 3, 8]]
    assert alike_groups(heads, 9) == [[head] for head in range(9)]


def test_random_heads_are_as_large_as_those_they_replace() -> None:
    heads = 3 * torch.randn(4, 50, 40, generator=torch.Generator().manual_seed(0))
    drawn = pool_heads(heads, [[0, 1], [2, 3]], "random", seed=1)
    assert drawn.shape == (2, 50, 40)
    assert drawn.square().mean().sqrt() == pytest.approx(3, rel=0.05)
    assert torch.equal(drawn, pool_heads(heads, [[0, 1], [2, 3]], "random", seed=1))


def test_encoders_can_be_tied_but_not_converted() -> None:
    model = polyhead.load(tiny("bert"))
    tied, report = tie_key_values(model, 1)
    key = tied.attention_layers[0].module.key.weight.unflatten(0, (4, 8))
    torch.testing.assert_close(
        key, model.attention_layers[0].module.key.weight.unflatten(0, (4, 8)).mean(0).expand_as(key)
    )
    assert report.before == report.after
    gpt = tie_key_values(polyhead.load(tiny("gpt2")), 2)[0].attention_layers[0].module.c_attn.weight
    assert torch.equal(gpt[:, 32:40], gpt[:, 40:48])
    assert not torch.equal(gpt[:, 40:48], gpt[:, 48:56])
    with pytest.raises(InputError, match="no num_key_value_heads"):
        convert_to_gqa(model, 2)


def test_bad_input_is_refused() -> None:
    model = polyhead.load(tiny("llama"))
    with pytest.raises(InputError, match="Give a divisor"):
        convert_to_gqa(model, 3)
    with pytest.raises(InputError, match="expected 'mean'"):
        convert_to_gqa(model, 1, pool="median")
    with pytest.raises(InputError, match="expected 'neighbours'"):
        tie_key_values(model, 1, grouping="far")
    for family in ("gpt-neox", "bloom"):
        with pytest.raises(UnreadableModelError, match="not laid out head by head"):
            tie_key_values(polyhead.load(tiny(family)), 2)
