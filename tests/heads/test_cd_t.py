"""Contextual decomposition: exact sums on many families, each rule against its definition, known answers."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, inputs_for, tiny, tower_of
from torch.nn import functional as F

from polyhead.errors import InputError, UnreadableModelError
from polyhead.heads.cd_t import ContextualDecomposer, ContextualDecomposition
from polyhead.heads.split_tensor import SplitTensor, activations_split, cancelled
from polyhead.model import load

TEXT = [family for family in FAMILIES if "input_ids" in inputs_for(family)]


def restless(family, **changes):
    """A tiny model in float64 with biases and norm weights that matter."""
    module = tiny(family, **changes).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return load(module, tower=tower_of(family))


def unpadded(family):
    return {"input_ids": inputs_for(family)["input_ids"][1:]}


def split(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return SplitTensor.of(*(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)))


@pytest.mark.parametrize("family", TEXT)
def test_the_parts_sum_to_the_output_of_the_plain_model(family):
    model, inputs = restless(family), unpadded(family)
    with torch.no_grad():
        plain = model(**inputs).last_hidden_state
    decomposer = ContextualDecomposer(model)
    for found in (decomposer.from_heads(inputs, [(0, 1), (1, 2)]), decomposer.from_tokens(inputs, [1, 4])):
        # Norms that compute in float32 round the whole and the parts each in their way.
        torch.testing.assert_close(found.total, plain, rtol=1e-5, atol=3e-6)
        assert found.relevant.abs().max() > 1e-3
        assert found.irrelevant.abs().max() > 1e-3


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3", "gpt-neox"])
def test_all_tokens_are_all_and_no_token_is_nothing(family):
    model, inputs = restless(family), unpadded(family)
    decomposer = ContextualDecomposer(model)
    assert decomposer.from_tokens(inputs, range(7)).irrelevant.abs().max() == 0
    assert decomposer.from_tokens(inputs, []).relevant.abs().max() == 0
    assert decomposer.from_heads(inputs, []).relevant.abs().max() == 0


def test_a_later_token_does_not_reach_an_earlier_one():
    model, inputs = restless("gpt2"), unpadded("gpt2")
    found = ContextualDecomposer(model).from_tokens(inputs, [4])
    assert found.relevant[:, :4].abs().max() == 0
    assert found.relevant[:, 4:].abs().max() > 0.01


def test_a_linear_layer_follows_the_definition():
    x, weight, bias = split((3, 5)), torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    found = F.linear(x, weight, bias)
    one, other = x.relevant @ weight.T, x.irrelevant @ weight.T
    share = one.abs() / (one.abs() + other.abs())
    one, other = one + share * bias, other + (1 - share) * bias
    clash = one * other < 0
    expected = torch.where(clash, torch.where(one.abs() >= other.abs(), one + other, 0.0), one)
    torch.testing.assert_close(found.relevant, expected)
    torch.testing.assert_close(found.whole, F.linear(x.whole, weight, bias))
    transposed = torch.addmm(bias, x, weight.T)
    torch.testing.assert_close(transposed.relevant, expected)


def test_a_layer_norm_follows_the_definition():
    x, weight, bias = split((3, 6)), torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    found = F.layer_norm(x, (6,), weight, bias, 1e-3)
    deviation = (x.whole.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt()
    one, other = ((part - part.mean(-1, keepdim=True)) / deviation * weight for part in (x.relevant, x.irrelevant))
    share = one.abs() / (one.abs() + other.abs())
    expected = cancelled(one + share * bias, other + (1 - share) * bias)
    torch.testing.assert_close(found.relevant, expected.relevant)
    torch.testing.assert_close(found.whole, F.layer_norm(x.whole, (6,), weight, bias, 1e-3))


def test_an_rms_norm_written_out_scales_each_part():
    x = split((3, 6))
    found = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    scale = (x.whole.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(found.relevant, x.relevant * scale)
    torch.testing.assert_close(F.rms_norm(x, (6,), None, 1e-6).irrelevant, x.irrelevant * scale)


def test_activations_and_gated_products_follow_the_definition():
    x, y = split((3, 6)), split((3, 6), seed=1)
    for found in (F.gelu(x), torch.tanh(x)):
        assert isinstance(found, SplitTensor)
    torch.testing.assert_close(F.gelu(x).irrelevant, F.gelu(x.irrelevant))
    torch.testing.assert_close(F.gelu(x).relevant, F.gelu(x.whole) - F.gelu(x.irrelevant))
    gated = F.silu(x) * y
    torch.testing.assert_close(gated.irrelevant, F.silu(x.irrelevant) * y.irrelevant)
    torch.testing.assert_close(gated.whole, F.silu(x.whole) * y.whole)


def test_attention_keeps_its_probabilities():
    query, key, value = (split((1, 2, 5, 4), seed=seed) for seed in range(3))
    weights = torch.softmax(query.whole @ key.whole.transpose(-1, -2) / 2, -1)
    found = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(found.relevant, weights @ value.relevant)
    eager = F.softmax(torch.matmul(query, key.transpose(2, 3)) * 0.5, dim=-1)
    assert not isinstance(eager, SplitTensor)
    torch.testing.assert_close(torch.matmul(eager, value).irrelevant, weights @ value.irrelevant)


def test_opposite_parts_are_cancelled_and_the_sum_is_kept():
    found = cancelled(torch.tensor([3.0, -1.0, 2.0]), torch.tensor([-1.0, 4.0, 5.0]))
    assert found.relevant.tolist() == [2, 0, 2]
    assert found.irrelevant.tolist() == [0, 3, 5]


def test_an_activation_module_is_treated_by_its_rule_however_it_is_written():
    """GPT-2's activation is a formula of many torch functions; the rule is for the module as a whole."""
    model, inputs = restless("gpt2", n_layer=1), unpadded("gpt2")
    module, split_calls = model.module.h[0].mlp.act, []

    def keep(_, args, output):
        if isinstance(args[0], SplitTensor):
            split_calls.append((args[0], output))

    with activations_split(model.module):
        handle = module.register_forward_hook(keep)  # after the rule's own hook: sees what the rule gave
        ContextualDecomposer(model).from_tokens(inputs, [1])
        handle.remove()
    (given, result), *_ = split_calls
    with torch.no_grad():
        torch.testing.assert_close(result.irrelevant, module(given.irrelevant))
        torch.testing.assert_close(result.whole, module(given.whole))


def one_way_model():
    """GPT-2 in which only head 2 of layer 0 gives anything, and layer 1 nothing."""
    module = tiny("gpt2").double()
    for index, block in enumerate(module.h):
        weight = block.attn.c_proj.weight.data
        weight[:16] = 0
        weight[24:] = 0
        weight[16:24] *= 20 * (index == 0)
    return load(module)


def test_heads_that_give_nothing_have_no_share():
    model, inputs = one_way_model(), unpadded("gpt2")
    shares = ContextualDecomposition().batch_shares(model, inputs)
    assert shares[0, 2] > 0.01
    assert shares.sum() == shares[0, 2]


def test_each_head_at_once_equals_one_by_one():
    model, inputs = restless("llama"), inputs_for("llama")
    decomposer = ContextualDecomposer(model, lambda outputs: outputs.last_hidden_state[:, 2])
    together = decomposer.each_head(inputs, 1)
    for head in range(4):
        torch.testing.assert_close(together[head], decomposer.from_heads(inputs, [(1, head)]).relevant)


def test_only_later_heads_are_reached_and_all_of_it_without_other_sources():
    model, inputs = restless("gpt2"), unpadded("gpt2")
    reached = ContextualDecomposer(model).to_heads(inputs, (0, 1))
    assert (reached[0] == 0).all()
    assert ((reached[1] > 0) & (reached[1] < 1)).all()
    dead = one_way_model()
    assert ContextualDecomposer(dead).to_heads(inputs, (0, 1)).max() == 0


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_padded_batch_equals_its_rows_one_by_one(family):
    model, inputs = restless(family), inputs_for(family)
    together = ContextualDecomposition().batch_shares(model, inputs)
    alone = sum(
        ContextualDecomposition().batch_shares(model, {"input_ids": inputs["input_ids"][row : row + 1, :length]})
        for row, length in ((0, 4), (1, 7))
    )
    torch.testing.assert_close(torch.tensor(together), torch.tensor(alone))


def test_logits_are_read_at_the_last_token():
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4)
    model = load(transformers.GPT2LMHeadModel(config).double().eval())
    inputs = inputs_for("gpt2")
    shares = ContextualDecomposition().batch_shares(model, inputs)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for row, last in ((0, 3), (1, 6)):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        for layer in range(2):
            for head in range(4):
                found = ContextualDecomposer(model).from_heads(one, [(layer, head)])
                y, part = (side[0, last] - side[0, last].mean() for side in (found.total, found.relevant))
                expected[layer, head] += ((part @ y) / (y @ y)).abs()
    torch.testing.assert_close(torch.tensor(shares), expected)


def test_bfloat16_sums_to_the_output():
    model = load(tiny("llama"), dtype="bfloat16")
    inputs = inputs_for("llama")
    with torch.no_grad():
        plain = model(**inputs).last_hidden_state
    found = ContextualDecomposer(model).from_heads(inputs, [(0, 0)])
    torch.testing.assert_close(found.total.float(), plain.float(), rtol=0.05, atol=0.05)


def test_what_has_no_rule_or_no_head_is_refused():
    with pytest.raises(UnreadableModelError, match="cumsum"):
        torch.cumsum(split((2, 3)), 0)
    decomposer = ContextualDecomposer(restless("bert"))
    with pytest.raises(InputError, match="Head 9"):
        decomposer.from_heads(unpadded("bert"), [(0, 9)])
    with pytest.raises(InputError, match="tokens 0 to 6"):
        decomposer.from_tokens(unpadded("bert"), [7])
    with pytest.raises(InputError, match="list of texts"):
        ContextualDecomposition().score(restless("bert"), "one text"[:0])


def test_the_model_is_left_as_it_was():
    model, inputs = restless("bert"), unpadded("bert")
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.module.modules())
    decomposer = ContextualDecomposer(model, lambda outputs: 1 / 0)
    for start in (lambda: decomposer.from_heads(inputs, [(0, 0)]), lambda: decomposer.from_tokens(inputs, [0])):
        with pytest.raises(ZeroDivisionError):
            start()
    after = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.module.modules())
    assert after == hooks
