"""Retrieval heads: a copying head built by hand scores 1, the rest 0; and against the definition in float64."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from by_hand import copying_model
from tiny import GROUPED, TEXT, tiny

import polyhead
from polyhead.act import Gate
from polyhead.errors import InputError
from polyhead.heads.needles import NeedlePrompt, Needles
from polyhead.heads.retrieval_heads import RetrievalHeads, RetrievalResult, needle_log_probability

GREEDY, FORCED = RetrievalHeads(), RetrievalHeads(mode="teacher-forced")


def words_of(text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
    return {"input_ids": [sum(map(ord, word)) % 90 + 3 for word in text.replace("\n", " \n ").split(" ") if word]}


@pytest.fixture
def copier():
    return polyhead.load(copying_model())


@pytest.fixture
def planted() -> Needles:
    hay = list(range(20, 38))
    prompts = [
        NeedlePrompt((*hay[:cut], 5, 11, 12, 13, *hay[cut:], 5), (11, 12, 13), (cut + 1, cut + 4)) for cut in (2, 9, 15)
    ]
    return Needles(tuple(prompts))


def causal(family: str):
    import transformers

    config = {
        "gpt2": ("GPT2Config", {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}),
        "llama": ("LlamaConfig", GROUPED),
        "gemma3": ("Gemma3TextConfig", {**GROUPED, "sliding_window": 12, "query_pre_attn_scalar": 8}),
        "gemma2": ("Gemma2Config", {**GROUPED, "sliding_window": 12, "query_pre_attn_scalar": 8}),
        "gpt-neox": ("GPTNeoXConfig", TEXT),
    }[family]
    torch.manual_seed(0)
    chosen = getattr(transformers, config[0])(**config[1])
    return polyhead.load(transformers.AutoModelForCausalLM.from_config(chosen).eval())


@pytest.mark.parametrize("score", [GREEDY, FORCED], ids=["greedy", "teacher-forced"])
def test_a_copying_head_scores_one_and_all_others_zero(copier, planted, score):
    result = score.measure(copier, planted)
    expected = np.zeros((2, 3))
    expected[1, 0] = 1
    assert (result.to_map().values == expected).all()
    assert (result.recall == 1).all()
    assert result.share_above() == 1 / 6
    assert (result.frequency().values == expected).all()


def test_what_the_model_does_not_write_is_no_hit_unless_teacher_forced(copier, planted):
    one = planted.prompts[0]
    lying = Needles((NeedlePrompt((*one.prompt[:-1], 6), one.answer, one.needle),))  # asks for what is not there
    assert GREEDY.measure(copier, lying).scores.max() == 0
    forced = FORCED.measure(copier, lying)
    assert forced.scores[0, 1, 0] == pytest.approx(2 / 3)  # the first token cannot be found, the others follow
    assert forced.recall[0] == pytest.approx(2 / 3)


def test_switching_the_copying_head_off_takes_the_answer_away(copier, planted):
    off = [[], [(1, 0)], [(1, 1), (1, 2)]]
    found = needle_log_probability(copier, planted, off)
    assert (found[1] < found[0] - 3).all()
    np.testing.assert_allclose(found[2], found[0], atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "gemma2", "gpt-neox"])
def test_scores_are_those_of_whole_attention_matrices(family):
    model = causal(family)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 98, (20,), generator=generator).tolist()
    prompt = NeedlePrompt(tuple(ids), tuple(ids[10:18]), (10, 18))
    whole = torch.tensor([ids + ids[10:17]])
    with model.record("attention") as recording, torch.no_grad():
        model(input_ids=whole)
    expected = np.zeros((2, 4))
    for layer in range(2):
        rows = recording.layer_attention(layer)[0].double()[:, 19:27]
        for head in range(4):
            best = rows[head].argmax(-1).tolist()
            hit = {t for b, t in zip(best, ids[10:18], strict=True) if 10 <= b < 18 and ids[b] == t}
            expected[layer, head] = len(hit) / len(set(ids[10:18]))
    found = FORCED.measure(model, Needles((prompt,)))
    np.testing.assert_array_equal(found.scores[0], expected)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_log_probability_with_heads_off_is_that_of_gates_on_the_answer_steps(family):
    model = causal(family)
    ids = torch.randint(3, 98, (20,), generator=torch.Generator().manual_seed(4)).tolist()
    needles = Needles((NeedlePrompt(tuple(ids), tuple(ids[10:14]), (10, 14)),))
    heads = [(0, 1), (1, 3)]
    found = needle_log_probability(model, needles, [[], heads])[:, 0]
    whole = torch.tensor([ids + ids[10:13]])

    def change(layer, z):
        z = z.clone()
        for at, head in heads:
            if at == layer:
                z[:, 19:, head] = 0
        return z

    with torch.no_grad():
        plain = model(input_ids=whole).logits
        with model.tap_heads(change):
            gated = model(input_ids=whole).logits
    for value, logits in zip(found, (plain, gated), strict=True):
        logp = logits[0, 19:].double().log_softmax(-1)
        expected = sum(logp[i, token].item() for i, token in enumerate(ids[10:14]))
        assert value == pytest.approx(expected, abs=1e-4)


def test_an_even_split_of_draws_shares_one_reading(copier, planted):
    gates = needle_log_probability(copier, planted, [[(0, 0)]] * 3)
    assert (gates == gates[0]).all()
    with Gate.off([(1, 0)], copier).on(copier):
        assert GREEDY.measure(copier, planted).recall.max() < 1


def test_needles_stand_where_they_say():
    texts = [" ".join(f"w{n}x{i}" for i in range(17)) for n in range(30)]
    tokenizer = SimpleNamespace(bos_token_id=1)
    tokenizer_call = type("T", (), {"__call__": staticmethod(words_of), "bos_token_id": tokenizer.bos_token_id})()
    needles = Needles.build(tokenizer_call, texts, lengths=(60, 100), depths=(0.0, 0.5, 1.0), each=2, seed=1)
    assert len(needles) == 12
    for prompt in needles.prompts:
        first, end = prompt.needle
        assert prompt.prompt[first:end] == prompt.answer
        question = prompt.prompt[-(len(words_of("\nThe password of the red fox is")["input_ids"])) :]
        assert question[-3:] == prompt.prompt[first - 3 : first]
        assert prompt.prompt[0] == 1
    assert {prompt.length for prompt in needles.prompts} == {60, 100}
    assert [needles.prompts[at].depth for at in (0, 4)] == [0, 1]
    again = Needles.build(tokenizer_call, texts, lengths=(60, 100), depths=(0.0, 0.5, 1.0), each=2, seed=1)
    assert again.prompts == needles.prompts
    assert Needles.build(tokenizer_call, texts, lengths=(60,), seed=2).prompts[0] != needles.prompts[0]
    with pytest.raises(InputError, match="needs more text"):
        Needles.build(tokenizer_call, texts[:2], lengths=(100,))


def test_refusals(copier, planted):
    with pytest.raises(InputError, match="both directions"):
        FORCED.measure(polyhead.load(tiny("bert")), planted)
    with pytest.raises(InputError, match="lm_head=True"):
        GREEDY.measure(polyhead.load(tiny("llama")), planted)
    with pytest.raises(InputError, match="expected Needles"):
        GREEDY.score(copier, ["text"])
    with pytest.raises(InputError, match="no such head"):
        needle_log_probability(copier, planted, [[(7, 0)]])
    with pytest.raises(InputError, match="inside the prompt"):
        NeedlePrompt((1, 2), (1,), (1, 3))
    with pytest.raises(InputError, match="mode"):
        RetrievalHeads(mode="beam").measure(copier, planted)
    assert np.isnan(FORCED.measure(polyhead.load(tiny("llama")), planted).recall).all()


def test_bf16_models_are_scored():
    model = causal("llama")
    ids = torch.randint(3, 98, (20,), generator=torch.Generator().manual_seed(3)).tolist()
    needles = Needles((NeedlePrompt(tuple(ids), tuple(ids[10:18]), (10, 18)),))
    model.module.to(torch.bfloat16)
    found = RetrievalHeads().measure(model, needles)
    assert isinstance(found, RetrievalResult)
    assert np.isfinite(found.scores).all()
