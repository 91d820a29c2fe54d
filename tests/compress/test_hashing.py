"""Hashes, rows and words as spaCy and thinc have them; a model's table fitted as well as least squares can."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from spacy.lang.lex_attrs import word_shape as spacy_shape
from spacy.strings import hash_string
from thinc.api import HashEmbed
from tiny import inputs_for, tiny

import polyhead
from polyhead.compress import HashEmbedding, MultiHashEmbedding, collisions, hash_text, hash_tokens, word_shape
from polyhead.errors import InputError, UnreadableModelError

WORDS = ["apple", "Österreich", "", "GPT-2", "a" * 120, "1999", "U.S.A.", "naïve", "Wednesday", "12345678", "日本語"]


def test_words_are_numbered_and_shaped_as_in_spacy() -> None:
    unsigned = [hash_text(word) % (1 << 64) for word in WORDS if word]
    assert unsigned == [hash_string(word) for word in WORDS if word]
    assert [word_shape(word) for word in WORDS] == [spacy_shape(word) for word in WORDS]


@pytest.mark.parametrize("seed", [0, 7])
def test_rows_and_sums_are_those_of_thinc(seed: int) -> None:
    keys = np.random.default_rng(0).integers(0, 1 << 63, 200, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    theirs = HashEmbed(16, 50, seed=seed).initialize()
    ours = HashEmbedding(50, 16, seed=seed)
    ours.weight.data = torch.from_numpy(theirs.get_param("E").copy())
    found = ours(torch.from_numpy(keys.view(np.int64)))
    torch.testing.assert_close(found.detach(), torch.from_numpy(theirs.predict(keys)), atol=1e-6, rtol=1e-6)
    assert ours.rows_of(torch.from_numpy(keys.view(np.int64))).max() == 49


def test_gradients_reach_the_rows_that_were_picked() -> None:
    table = HashEmbedding(10, 3, hashes=2).double()
    keys = torch.tensor([[5, 9, 5]])
    assert torch.autograd.gradcheck(
        lambda weight: torch.func.functional_call(table, {"weight": weight}, (keys,)), table.weight
    )
    table(keys).sum().backward()
    rows, times = table.rows_of(keys).flatten().unique(return_counts=True)
    expected = torch.zeros(10, 3).double()
    expected[rows] = times[:, None].double()
    assert torch.equal(table.weight.grad, expected)


def test_words_become_the_greatest_of_linear_maps_of_their_attributes() -> None:
    torch.manual_seed(0)
    words = MultiHashEmbedding(6, {"norm": 40, "suffix": 20, "shape": 10}, hashes=3, pieces=2).double()
    vectors, real = words([["Apple", "pies"], ["GPT-2"]])
    assert real.tolist() == [[True, True], [True, False]]
    each = []
    for name, text in (("norm", "gpt-2"), ("suffix", "T-2"), ("shape", "XXX-d")):
        table = words.tables[name]
        each.append(table.weight[table.rows_of(torch.tensor(hash_text(text)))].sum(0))
    maps = (words.mixer.weight @ torch.cat(each) + words.mixer.bias).view(6, 2)
    mixed = torch.stack([maps[:, 0], maps[:, 1]]).max(0).values
    expected = (mixed - mixed.mean()) / (mixed.var(unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(vectors[1, 0], expected)
    keys, _ = words.keys([["Apple", "pies"], ["GPT-2"]])
    assert torch.equal(words(keys)[0], vectors)
    alike = words([["Apple"], ["apple"]])[0][:, 0]
    assert not torch.equal(alike[0], alike[1])  # one norm, two shapes


def test_more_hashes_tell_more_words_apart() -> None:
    keys = torch.arange(3000)
    found = {hashes: collisions(keys, HashEmbedding(500, 4, hashes)) for hashes in (1, 2, 4)}
    # One hash: a key is alone in its row with probability (1 - 1 / 500) ** 2999.
    assert found[1]["same_vector"] == pytest.approx(1 - (1 - 1 / 500) ** 2999, abs=0.01)
    assert found[1]["own_row"] == pytest.approx(1 - found[1]["same_vector"])
    assert found[1]["same_vector"] > found[2]["same_vector"] > found[4]["same_vector"] == 0


@pytest.mark.parametrize("family", ["bert", "llama", "gemma3"])
def test_a_models_table_is_the_least_squares_one(family: str) -> None:
    model = polyhead.load(tiny(family))
    counts = torch.arange(99) % 5
    smaller, report = hash_tokens(model, 30, hashes=3, counts=counts)
    made = smaller.module.get_input_embeddings()
    picks = torch.zeros(99, 30).double()
    for token, rows in enumerate(made.table.rows_of(torch.arange(99)).tolist()):
        for row in rows:
            picks[token, row] += 1
    wanted = model.module.get_input_embeddings().weight.detach().double()
    root = (1.0 + counts.double()).sqrt()[:, None]
    best = torch.linalg.lstsq(root * picks, root * wanted).solution
    torch.testing.assert_close(made.table.weight.detach().double(), best, atol=2e-4, rtol=1e-2)
    lost = (root * (picks @ best - wanted)).square().sum() / (root * wanted).square().sum()
    assert report.details["share of the embedding lost"] == pytest.approx(float(lost), rel=1e-3)
    assert report.before.parameters - report.after.parameters == (99 - 30) * 32
    with torch.no_grad():
        before, after = (each(**inputs_for(family)).last_hidden_state for each in (model, smaller))
    assert report.change > 0
    assert before.shape == after.shape


def test_a_table_with_a_row_a_token_loses_nothing_and_trains() -> None:
    model = polyhead.load(tiny("llama"))
    old = model.module.get_input_embeddings().weight
    with torch.no_grad():
        old[50:] = 0.0
        old[:50] = old[:1]  # only one vector: any table can hold it
    smaller, report = hash_tokens(model, 98, hashes=1, counts=(torch.arange(99) < 50).long() * 10_000)
    assert report.details["share of the embedding lost"] < 0.05
    smaller(input_ids=torch.tensor([[3, 4]])).last_hidden_state.square().sum().backward()
    assert float(smaller.module.get_input_embeddings().table.weight.grad.abs().sum()) > 0
    assert isinstance(copy.deepcopy(smaller.module).get_input_embeddings(), torch.nn.Module)


def test_bad_input_is_refused() -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(InputError, match="1 to 98 rows"):
        hash_tokens(polyhead.load(tiny("llama")), 99)
    with pytest.raises(InputError, match=r"counts \[99\]"):
        hash_tokens(polyhead.load(tiny("llama")), 9, counts=torch.ones(3))
    with pytest.raises(UnreadableModelError, match="no token embedding"):
        hash_tokens(polyhead.load(tiny("vit")), 9)
    tied = AutoModelForCausalLM.from_config(tiny("gpt2").config)
    with pytest.raises(UnreadableModelError, match="shares its token embedding"):
        hash_tokens(polyhead.load(tied), 9)
    with pytest.raises(InputError, match="1 to 4 hashes"):
        HashEmbedding(10, 4, hashes=5)
    with pytest.raises(InputError, match="norm, prefix"):
        MultiHashEmbedding(8, {"colour": 10})
