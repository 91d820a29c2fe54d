"""Caches with a budget for each head: exact where whole, the definition where not, and true bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import polyhead
from polyhead.cache import CachePolicy, HeadKVPolicy, Look, RazorPolicy, WindowPolicy, allocate_budget
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from tests.tiny import tiny

SCORES = HeadMap([[0.9, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.8]], name="looks back")


def decoder(family: str, kernel: str = "sdpa", **changes: Any) -> polyhead.HeadedModel:
    torch.manual_seed(0)
    config = tiny(family, **changes).config
    config._attn_implementation = kernel
    return polyhead.load(AutoModelForCausalLM.from_config(config).eval())


def ids(rows: int = 1, tokens: int = 12) -> torch.Tensor:
    return torch.randint(3, 99, (rows, tokens), generator=torch.Generator().manual_seed(1))


def run(model: polyhead.HeadedModel, policy: CachePolicy, pieces: list[torch.Tensor]) -> tuple[torch.Tensor, Any]:
    """Logits of all tokens, fed piece by piece."""
    with torch.no_grad(), policy.on(model) as cache:
        return torch.cat([model.module(input_ids=piece, past_key_values=cache).logits for piece in pieces], 1), cache


def visible_by_definition(tokens: int, prompt: int, budgets: list[int | None], sinks: int, window: int) -> torch.Tensor:
    """``[kv_heads, tokens, tokens]``: in the prompt all before; later sinks, the window, and the token itself."""
    seen = torch.tril(torch.ones(tokens, tokens, dtype=torch.bool)).repeat(len(budgets), 1, 1)
    for head, budget in enumerate(budgets):
        if budget is None:
            continue
        for t in range(prompt, tokens):
            for s in range(t):
                seen[head, t, s] = s < sinks or s >= t - window
    return seen


def with_masks(model: polyhead.HeadedModel, given: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
    """Logits of one pass over everything, in which each head sees what its mask says."""
    from dataclasses import replace

    def prepare(layer: int, call: Any) -> Any:
        group = call.query.shape[1] // len(masks[layer])
        return replace(call, mask=masks[layer].repeat_interleave(group, 0)[None])

    with torch.no_grad(), model.tap_attention(prepare=prepare):
        return model.module(input_ids=given, use_cache=False).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3", "mistral"])
def test_whole_budget_is_exact_and_generates_the_same(family: str) -> None:
    model = decoder(family)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.module.generate(ids(2), **settings)
    pieces = list(ids(2).split([7, 1, 1, 3], 1))
    with torch.no_grad():
        plain = DynamicCache(config=model.config)
        logits = torch.cat([model.module(input_ids=piece, past_key_values=plain).logits for piece in pieces], 1)
    found, _ = run(model, WindowPolicy(protect=1.0), pieces)
    assert torch.equal(found, logits)
    with WindowPolicy(protect=1.0).on(model) as cache:
        assert torch.equal(model.module.generate(ids(2), past_key_values=cache, **settings), wanted)
    assert model.module.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("sinks", "window"), [(0, 3), (2, 3), (1, 1)])
def test_window_by_definition(sinks: int, window: int) -> None:
    model = decoder("llama")
    policy = WindowPolicy(SCORES, protect=0.5, window=window, sinks=sinks)
    budgets = policy.budgets(model)
    assert [[each is None for each in row] for row in budgets] == [[True, False], [False, True]]
    given, prompt = ids(2, 14), 8
    found, cache = run(model, policy, [given[:, :prompt], *given[:, prompt:].split(1, 1)])
    # A step keeps its own token and then drops to the budget: the next sees sinks, the window, and itself.
    masks = [visible_by_definition(14, prompt, row, sinks, window) for row in budgets]
    assert torch.allclose(found, with_masks(model, given, masks), atol=1e-5)
    assert cache.kept() == [[14, window + sinks], [window + sinks, 14]]
    assert not torch.allclose(found, with_masks(model, given, [torch.ones(2, 14, 14).tril().bool()] * 2), atol=1e-3)


def test_bytes_are_what_is_held() -> None:
    model = decoder("llama")
    given = ids(1, 40)
    _, whole = run(model, WindowPolicy(protect=1.0), [given])
    _, half = run(model, WindowPolicy(SCORES, protect=0.5, window=3, sinks=1), [given])
    per_token = 2 * 8 * 4 + 4  # keys and values of 8 floats, and a place
    assert whole.bytes == 2 * 2 * 40 * per_token
    assert half.bytes == (2 * 40 + 2 * 4) * per_token
    held = [each for layer in half.layers for group in layer.groups for each in group.tensors()]
    assert half.bytes == sum(each.untyped_storage().nbytes() for each in held)


def test_padding_on_the_left_changes_nothing() -> None:
    model = decoder("llama")
    policy = WindowPolicy(SCORES, protect=0.25, window=3, sinks=2)
    short = ids(1, 9)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with policy.on(model) as cache:
        alone = model.module.generate(short, past_key_values=cache, **settings)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)
    both = torch.cat([padded, ids(1, 13)])
    mask = (torch.arange(13) >= torch.tensor([[4], [0]])).long()
    with policy.on(model) as cache:
        found = model.module.generate(both, attention_mask=mask, past_key_values=cache, **settings)
    assert torch.equal(found.sequences[0, 4:], alone.sequences[0])
    for here, there in zip(found.logits, alone.logits, strict=True):
        assert torch.allclose(here[0], there[0], atol=1e-5)


def test_sliding_layers_keep_their_own_rule() -> None:
    model = decoder("gemma3", layer_types=["sliding_attention", "full_attention"])
    _, cache = run(model, WindowPolicy(window=2, sinks=1), [ids(1, 10), ids(1, 1)])
    assert cache.kept()[0] == []
    assert cache.layers[0].keys.shape[2] == 2
    assert cache.kept()[1] == [3, 3]


def test_beams_carry_their_caches() -> None:
    model = decoder("llama")
    settings = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.module.generate(ids(2), **settings)
    with WindowPolicy(window=100).on(model) as cache:
        assert torch.equal(model.module.generate(ids(2), past_key_values=cache, **settings), wanted)


def test_a_cache_starts_again_after_reset() -> None:
    model = decoder("llama")
    policy = WindowPolicy(window=3)
    with torch.no_grad(), policy.on(model) as cache:
        first = model.module(input_ids=ids(), past_key_values=cache).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(model.module(input_ids=ids(), past_key_values=cache).logits, first)


def test_bfloat16_groups_are_packed_to_the_same() -> None:
    model = decoder("llama")
    exact, _ = run(model, WindowPolicy(protect=1.0), list(ids(1, 9).split([8, 1], 1)))
    model.module.to(torch.bfloat16)
    packed, _ = run(model, WindowPolicy(protect=1.0), list(ids(1, 9).split([8, 1], 1)))
    assert packed.dtype == torch.bfloat16
    assert torch.allclose(packed.float(), exact, atol=0.02)


def test_heads_can_be_recorded_through_a_cache() -> None:
    model = decoder("llama")
    given = ids(1, 9)
    plain, _ = run(model, WindowPolicy(window=2), list(given.split([8, 1], 1)))
    with torch.no_grad(), WindowPolicy(window=2).on(model) as cache, model.record("heads") as found:
        model.module(input_ids=given[:, :8], past_key_values=cache)
        last = model.module(input_ids=given[:, 8:], past_key_values=cache).logits
    assert torch.allclose(last, plain[:, -1:], atol=1e-6)
    assert found.heads.shape == (1, 2, 4, 1, 8)
    with torch.no_grad(), WindowPolicy(window=2).on(model) as cache, model.tap_attention(lambda layer, call: None):
        model.module(input_ids=given[:, :8], past_key_values=cache)
        tapped = model.module(input_ids=given[:, 8:], past_key_values=cache).logits
    assert torch.allclose(tapped, last, atol=1e-6)


def test_one_token_stands_for_the_dropped() -> None:
    model = decoder("llama")
    policy = RazorPolicy(SCORES, protect_induction=0.25, window=3, sinks=1)
    given = ids(1, 10)
    _, cache = run(model, policy, [given])
    layer = cache.layers[1]
    group = next(each for each in layer.groups if each.budget is not None)
    _, whole = run(model, WindowPolicy(protect=1.0), [given])
    keys, values = whole.layers[1].groups[0].keys[:, group.heads], whole.layers[1].groups[0].values[:, group.heads]
    gone = slice(1, 7)
    query = torch.randn(1, 4, 1, 8, generator=torch.Generator().manual_seed(2))
    layer.seen += 1
    found = layer.attend(query, None, 0.5).unflatten(1, (2, 2))[:, group.heads]
    layer.seen -= 1
    kept = [0, 7, 8, 9]
    for place, head in enumerate(group.heads):
        own_keys = torch.cat([keys[0, place, gone].mean(0, keepdim=True), keys[0, place, kept]])
        own_values = torch.cat([values[0, place, gone].mean(0, keepdim=True), values[0, place, kept]])
        weight = torch.tensor([6.0, 1, 1, 1, 1])
        for g in range(2):
            e = weight * torch.exp(0.5 * own_keys @ query[0, 2 * head + g, 0])
            assert torch.allclose(found[0, place, g, 0], (e / e.sum()) @ own_values, atol=1e-5)


def test_razor_protecting_all_is_exact() -> None:
    model = decoder("llama")
    pieces = list(ids(1, 12).split([6, 1, 1, 4], 1))
    wanted, _ = run(model, WindowPolicy(protect=1.0), pieces)
    found, _ = run(model, RazorPolicy(SCORES, SCORES, protect_induction=1.0, window=1), pieces)
    assert torch.equal(found, wanted)


def test_budgets_are_conserved_exactly() -> None:
    rng = np.random.default_rng(0)
    for base, beta in ((8, 1.0), (17, 1.3), (128, 2.0), (5, 100.0)):
        scores = rng.random(23) ** 3
        given = allocate_budget(scores, base, beta)
        assert given.sum() == 23 * base
        exact = base - base / beta + scores / scores.sum() * 23 * base / beta
        assert np.abs(given - exact).max() < 1
    assert allocate_budget(np.zeros(4), 8, 2.0).tolist() == [8] * 4


def test_head_kv_keeps_what_the_last_tokens_look_at() -> None:
    policy = HeadKVPolicy(SCORES, observe=2, pool=1)
    keys = torch.zeros(1, 1, 8, 4)
    keys[0, 0, 3] = torch.tensor([5.0, 0, 0, 0])
    queries = torch.zeros(1, 1, 2, 8, 4)
    queries[..., 0] = 1.0
    places = torch.arange(8)[None, None]
    look = Look(0, [0], 4, keys, keys, places, torch.ones_like(places, dtype=torch.bool), 8, queries, 1.0)
    worth = policy.priority(look)[0, 0]
    assert worth[6:].isinf().all()
    assert worth[:6].argmax() == 3
    row = torch.tensor([1.0, 1, 1, np.exp(5.0), 1, 1, 1, 1])
    first = row.clone()
    first[7] = 0
    wanted = (row / row.sum() + first / first.sum()) / 2
    assert torch.allclose(worth[:6], wanted[:6].float(), atol=1e-6)


def test_head_kv_budgets_differ_by_head_and_stay() -> None:
    model = decoder("llama")
    policy = HeadKVPolicy(SCORES, base=4, beta=1.0, observe=2, pool=1)
    budgets = policy.budgets(model)
    assert sum(sum(row) for row in budgets) == 4 * (4 + 2)
    _, cache = run(model, policy, [ids(1, 30), *ids(1, 3).split(1, 1)])
    assert cache.kept() == [[budget + 3 for budget in row] for row in budgets]
    assert len({budget for row in budgets for budget in row}) > 1


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="HeadMap that says which"):
        WindowPolicy(protect=0.5)
    with pytest.raises(InputError, match="share from 0"):
        WindowPolicy(protect=1.5)
    with pytest.raises(InputError, match="2 layers of 4 heads"):
        WindowPolicy(HeadMap([[1.0, 2.0]]), protect=0.5).budgets(decoder("llama"))
    with pytest.raises(InputError, match="base"):
        allocate_budget(np.ones(3), 0, 1.0)
    with pytest.raises(InputError, match="odd pool"):
        HeadKVPolicy(SCORES, pool=4)
    with pytest.raises(InputError, match="shares from 0"):
        RazorPolicy(SCORES, protect_echo=2.0)
    with (
        pytest.raises(polyhead.errors.UnreadableModelError, match="interface"),
        WindowPolicy().on(decoder("bloom", "eager")),
    ):
        pass
