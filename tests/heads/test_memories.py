"""Feed-forward memories: triggers, agreement and composition by definition, one text at a time, and set by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import tiny

from polyhead.errors import InputError
from polyhead.heads.memories import Memories
from polyhead.model import HeadedModel, load

TEXTS = ["abcdefgh", "zy", "hello", "q", "banana", "onetwo", "xaab"]


class Letters:
    """A letter a token, from 3; 1 begins a text, 0 pads on the given side."""

    all_special_ids = (0, 1)

    def __init__(self, side: str = "right") -> None:
        self.side = side

    def __call__(self, texts, return_tensors=None, padding=False, truncation=False, max_length=99):
        rows = [[1, *(ord(letter) - 94 for letter in text)][:max_length] for text in texts]
        width = max(map(len, rows))
        gaps = [[0] * (width - len(row)) for row in rows]
        right = self.side == "right"
        ids = [row + gap if right else gap + row for row, gap in zip(rows, gaps, strict=True)]
        ones = [[1] * len(row) for row in rows]
        mask = [one + gap if right else gap + one for one, gap in zip(ones, gaps, strict=True)]
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}

    def decode(self, ids):
        return "".join(chr(i + 94) for i in ids if i > 2)


def _language_model(family: str, side: str = "right", dtype: torch.dtype = torch.float32) -> HeadedModel:
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_config(tiny(family).config).eval()
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        scale = 0.3 if parameter.dim() == 1 else 0.2
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * scale)
    model = load(module.to(dtype))
    model.__dict__["tokenizer"] = Letters(side)
    return model


def _down(model: HeadedModel, layer: int):
    at = model.module
    return at.transformer.h[layer].mlp.c_proj if hasattr(at, "transformer") else at.model.layers[layer].mlp.down_proj


def _one_by_one(model: HeadedModel, layer: int) -> list[tuple[int, int, int, torch.Tensor]]:
    """(text, position, next token, coefficients) of every token of text that another follows, each text alone."""
    found = []
    for text, words in enumerate(TEXTS):
        ids = Letters()([words])["input_ids"]
        got: list[torch.Tensor] = []
        handle = _down(model, layer).register_forward_pre_hook(lambda _, args, got=got: got.append(args[0][0]))
        with torch.no_grad():
            model(input_ids=ids)
        handle.remove()
        found += [(text, at, int(ids[0, at + 1]), got[0][at].float()) for at in range(1, ids.shape[1] - 1)]
    return found


@pytest.mark.parametrize(
    ("family", "side"), [("gpt2", "left"), ("gpt2", "right"), ("gemma3", "left"), ("llama", "right")]
)
def test_top_prefixes_are_those_of_texts_run_one_by_one(family, side):
    model = _language_model(family, side)
    if family == "gpt2" and side == "left":  # positions are not shifted by padding: give them no weight
        model.module.transformer.wpe.weight.data.zero_()
    seen = _one_by_one(model, 1)
    table = torch.stack([m for *_, m in seen])
    found = Memories(model, batch_size=3).top_prefixes(TEXTS, 1, memories=[4, 30, 0], k=5)
    for triggers, memory in zip(found, [4, 30, 0], strict=True):
        order = table[:, memory].sort(descending=True, stable=True)
        assert torch.allclose(torch.tensor([t.coefficient for t in triggers]), order.values[:5], atol=1e-5)
        best = seen[int(order.indices[0])]
        first = triggers[0]
        assert (first.text, len(first.ids) - 1, first.next_token) == best[:3]
        assert (first.layer, first.memory, first.ids[0]) == (1, memory, 1)
        assert TEXTS[first.text].startswith(Letters().decode(first.ids))
    every = Memories(model).top_prefixes(TEXTS, 1, k=1000)
    assert len(every) == table.shape[1]
    assert len(every[0]) == len(table)
    assert Memories(model).text(every[0][0]) == Letters().decode(every[0][0].ids)


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_agreement_and_composition_are_their_definitions(family):
    """Values through norm after, final norm and unembedding by the model's own modules; every memory, in float64."""
    model = _language_model(family)
    seen = _one_by_one(model, 0)
    table = torch.stack([m for *_, m in seen])
    module = model.module
    down = _down(model, 0).weight.double()
    values = down if family == "gpt2" else down.T  # [memories, hidden]
    if family == "gemma3":
        values = values * (1 + module.model.layers[0].post_feedforward_layernorm.weight.double())

    def logits(rows: torch.Tensor) -> torch.Tensor:
        if family == "gpt2":
            gained = (rows - rows.mean(-1, keepdim=True)) * module.transformer.ln_f.weight.double()
        else:
            gained = rows * (1 + module.model.norm.weight.double())
        return gained @ module.get_output_embeddings().weight.double().T

    with torch.no_grad():
        votes, against = logits(values).argmax(1), logits(values).argmin(1)
        following = torch.tensor([seen[int(row)][2] for row in table.argmax(0)])
        memories = Memories(model, batch_size=3)
        found = memories.agreement_rate(TEXTS)
        assert found.hits[0].tolist() == (votes == following).tolist()
        others = (votes[None] == following[:, None]).double()
        expected = (others.sum(1) - others.diagonal()) / (len(votes) - 1)
        assert np.allclose(found.shuffled[0], expected.numpy())
        assert found.rates[0] == found.hits[0].mean()
        own = logits(values).gather(1, following[:, None])
        above = (logits(values) > own).double().mean(1) * logits(values).shape[1] / (logits(values).shape[1] - 1)
        assert np.allclose(found.ranks[0], above.numpy(), atol=1e-9)
        assert abs(found.shuffled_ranks[0].mean() - 0.5) < 0.2
        layer = logits(table.double() @ values).argmax(1)
    alone = torch.where(table > 0, votes, against)
    rate = 1 - float((alone == layer[:, None]).any(1).double().mean())
    composed = memories.composition_rate(TEXTS, layers=[0], positions=1000)
    assert composed.rates == pytest.approx([rate])
    assert composed.active == pytest.approx([float((table != 0).double().mean())])
    few = memories.agreement_rate(TEXTS, per_layer=6, seed=1)
    assert [len(hits) for hits in few.hits] == [6, 6]


def _by_hand() -> HeadedModel:
    """Layer 0: memory i is woken by token i and promotes i + 1. Layer 1: memory i promotes i. Heads write nothing."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=32, n_positions=40, n_embd=64, n_layer=2, n_head=2, n_inner=32)
    module, eye = GPT2LMHeadModel(config).eval(), torch.eye(64)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(1.0) if "ln_" in name and name.endswith("weight") else parameter.zero_()
        module.transformer.wte.weight.copy_(eye[:32])
        for layer, block in enumerate(module.transformer.h):
            block.mlp.c_fc.weight.copy_(eye[:, :32])
            block.mlp.c_proj.weight.copy_(0.01 * (eye[:32].roll(1, dims=1) if layer == 0 else eye[:32]))
        module.lm_head.weight = module.transformer.wte.weight
    model = load(module)
    model.__dict__["tokenizer"] = Letters()
    return model


def test_memories_set_by_hand_agree_where_they_know_the_next_token():
    model = _by_hand()
    memories = Memories(model)
    texts = ["abcdefghijklmnop", "lmnopqrstuvwxyz", "pqr"]
    found = memories.top_prefixes(texts, 0, memories=[7], k=2)[0]  # token 7 is "e"
    assert memories.text(found[0]) == "abcde"
    assert Letters().decode([found[0].next_token]) == "f"
    assert memories.value_tokens(0, 7, k=1)[0][0] == 8
    rates = memories.agreement_rate(texts)
    letters = slice(3, 28)  # tokens that another follows: a to y
    assert rates.hits[0][letters].all()
    assert not rates.hits[1][letters].any()
    assert rates.shuffled_rates[0] < 0.1
    assert (rates.ranks[0][letters] == 0).all()
    assert (rates.shuffled_ranks[0][letters] > 0).mean() > 0.7
    # One memory is woken by far the most, and the layer votes as it does.
    assert memories.composition_rate(texts, layers=[0], positions=20).rates.tolist() == [0.0]
    # A key of one token does not mind the first token of its prefix, and loses all with the last.
    triggers = [row[0] for row in memories.top_prefixes(texts, 0, memories=range(4, 12), k=1)]
    assert np.allclose(memories.without(triggers, "first"), 0, atol=1e-6)
    assert (memories.without(triggers, "last") < -0.9).all()


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_removal_is_the_coefficient_of_the_shorter_text(family):
    model = _language_model(family)
    memories = Memories(model, batch_size=4)
    triggers = [t for layer in (0, 1) for row in memories.top_prefixes(TEXTS, layer, memories=[3, 9], k=6) for t in row]
    for which in ("first", "last"):
        found = memories.without(triggers, which)
        for trigger, change in zip(triggers, found, strict=True):
            if len(trigger.ids) < 3:
                assert np.isnan(change)
                continue
            left = [trigger.ids[0], *trigger.ids[2:]] if which == "first" else list(trigger.ids[:-1])
            got: list[torch.Tensor] = []
            handle = _down(model, trigger.layer).register_forward_pre_hook(
                lambda _, args, got=got: got.append(args[0][0, -1])
            )
            with torch.no_grad():
                model(input_ids=torch.tensor([left]))
            handle.remove()
            expected = (float(got[0][trigger.memory]) - trigger.coefficient) / trigger.coefficient
            assert change == pytest.approx(expected, abs=1e-4)


def test_special_tokens_and_ends_of_texts_trigger_nothing():
    memories = Memories(_language_model("llama"))
    every = memories.top_prefixes(TEXTS, 0, memories=[0], k=1000)[0]
    assert len(every) == sum(len(text) - 1 for text in TEXTS)
    assert all(trigger.ids[-1] > 2 and trigger.next_token > 2 for trigger in every)
    following = {pair for text in TEXTS for pair in pairwise(text)}
    pairs = {(Letters().decode(t.ids)[-1], Letters().decode([t.next_token])) for t in every}
    assert pairs == following


def test_a_model_that_sees_both_ways_has_triggers_but_no_votes():
    model = load(tiny("bert"))
    model.__dict__["tokenizer"] = Letters()
    memories = Memories(model)
    triggers = memories.top_prefixes(TEXTS, 1, memories=[5], k=2)[0]
    assert len(triggers) == 2
    assert len(memories.value_tokens(1, 5, 3)) == 3
    with pytest.raises(InputError, match="lm_head"):
        memories.agreement_rate(TEXTS)
    with pytest.raises(InputError, match="both ways"):
        memories.without(triggers, "last")


def test_wrong_requests_are_refused():
    memories = Memories(_language_model("llama"))
    with pytest.raises(InputError, match="layers 0 to 1"):
        memories.top_prefixes(TEXTS, 2)
    with pytest.raises(InputError, match="memories 0 to 36"):
        memories.top_prefixes(TEXTS, 0, memories=[37])
    with pytest.raises(InputError, match="two tokens"):
        memories.top_prefixes(["a", "b"], 0)
    with pytest.raises(InputError, match="'first' or 'last'"):
        memories.without([], "middle")
    with pytest.raises(InputError, match="list of at least one text"):
        memories.agreement_rate("abc")


def test_bf16_models_give_float_coefficients():
    memories = Memories(_language_model("llama", dtype=torch.bfloat16))
    assert isinstance(memories.top_prefixes(TEXTS, 0, memories=[1], k=1)[0][0].coefficient, float)
    assert memories.agreement_rate(TEXTS).rates.shape == (2,)
