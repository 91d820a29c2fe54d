"""MAPS and succession: a head that is a permutation by construction, and the definition in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from heads.by_hand_words import WORDS, next_word_model
from tiny import tiny

from polyhead.errors import InputError
from polyhead.heads.maps import Maps
from polyhead.heads.successor import SuccessorScore
from polyhead.heads.vocabulary import VocabularyView, token_states
from polyhead.heads.weights import read_weights
from polyhead.model import load

CLASSES = {"week": WORDS[:7], "numbers": [*WORDS[7:14], "eight"]}
NEXT = list(pairwise(WORDS))


def test_hand_built_successor_head_scores_one_and_a_zero_value_head_nothing():
    model = next_word_model()
    values = SuccessorScore(CLASSES).score(model).values
    assert values[1].tolist() == [1, 0]
    assert values[0].tolist() == [0, 0]
    found = SuccessorScore({"numbers": WORDS[7:14]}).with_null(model, shuffles=99)
    assert found.map.values[1, 0] == 1
    assert found.p[1, 0] == 0.01
    assert found.p[1, 1] == 1
    assert found.null[1, 0] == pytest.approx(1 / 6, abs=0.06)
    assert found.tokens == 6


@pytest.mark.parametrize("states", ["embedding", "first-mlp", "both"])
def test_planted_permutation_maps_every_pair_and_its_negative_suppresses(states):
    found = Maps(k=1, states=states).relation_score(next_word_model(), NEXT)
    assert found.promote.values.tolist() == [[0, 0], [1, 0]]
    assert Maps(k=1, states=states, suppress=True).score(next_word_model(-1.0), NEXT).values[1, 0] == 1
    assert Maps(k=1, states=states).score(next_word_model(-1.0), NEXT).values[1, 0] == 0


def test_salient_operations_and_what_the_head_does_in_a_prompt():
    model = next_word_model()
    found = Maps().salient_ops(model, 1, 0, n=3, targets=1, among=range(len(WORDS) - 1))
    assert all(WORDS.index(one.targets[0]) == WORDS.index(one.source) + 1 for one in found)
    model.module.transformer.wpe.weight.data.zero_()
    model.tokenize = lambda texts: {"input_ids": torch.tensor([model.tokenizer(texts[0])["input_ids"]])}
    dynamic = Maps(k=1).dynamic_score(model, NEXT, "{s}")  # a token that sees itself alone
    assert dynamic.values.tolist() == [[0, 0], [1, 0]]


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "llama"])
def test_rows_are_the_definition(family):
    model = load(tiny(family, tie_word_embeddings=True))
    for parameter in model.module.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)
    weights = read_weights(model, fold=False, dtype=torch.float64).layers[1].expanded()
    block = (model.module.h if family == "gpt2" else model.module.layers)[1]
    view = VocabularyView(model)
    x = torch.randn(3, 32)
    final = (model.module.ln_f if family == "gpt2" else model.module.norm).double()
    before = (block.ln_1 if family == "gpt2" else block.input_layernorm).double()
    bias = before(torch.zeros(32, dtype=torch.float64)) if family == "gpt2" else 0
    read = (before(x.double()) - bias) @ weights.value @ weights.output  # [heads, 3, hidden]
    if family == "gemma3":
        read = block.post_attention_layernorm.double()(read)
    logits = (
        final(read) - (final.bias if family == "gpt2" else 0)
    ) @ model.module.get_input_embeddings().weight.double().T
    mine = view.rows(x, 1).transpose(0, 1).double()
    cosine = torch.nn.functional.cosine_similarity(mine, logits, dim=-1)  # the sizes are left out
    assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "llama"])
def test_token_states_are_layer_zero_without_attention_and_positions(family):
    model = load(tiny(family))
    ids = torch.tensor([5, 17, 40])
    module = model.module
    states = {kind: token_states(model, ids, kind) for kind in ("embedding", "first-mlp", "both")}
    with torch.no_grad():
        x = module.get_input_embeddings()(ids)
        if family == "gpt2":
            wrote = module.h[0].mlp(module.h[0].ln_2(x))
        elif family == "llama":
            wrote = module.layers[0].mlp(module.layers[0].post_attention_layernorm(x))
        else:
            block = module.layers[0]
            wrote = block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x)))
    assert torch.allclose(states["embedding"], x, atol=1e-6)
    assert torch.allclose(states["first-mlp"], wrote, atol=1e-5)
    assert torch.allclose(states["both"], x + wrote, atol=1e-5)


def test_refusals():
    with pytest.raises(InputError, match="norm of their own"):
        token_states(load(tiny("bert")), [1])
    with pytest.raises(InputError, match="lm_head"):
        VocabularyView(load(tiny("llama")))
    with pytest.raises(InputError, match="No relation 'colour'"):
        Maps().score(next_word_model(), "colour")
    with pytest.raises(InputError, match="single tokens"):
        Maps().score(next_word_model(), [("elephant", "giraffe")])
    with pytest.raises(InputError, match="three words"):
        SuccessorScore({"letters": ["x", "y", "z"]}).score(next_word_model())


def test_rank_of_a_tie_is_the_middle():
    view = VocabularyView(next_word_model())
    above, below = view.ranks(torch.randn(2, 64), 0, torch.tensor([3, 4]))
    assert np.allclose(above, 14.5)
    assert np.allclose(below, 14.5)
