"""Tasks: one number an example, the same however examples are batched, and judged as the field judges them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from polyhead.data import SentencePairs
from polyhead.errors import InputError
from polyhead.heads.tasks import Batch, FunctionTask, NextToken, PairSimilarity, run_task
from polyhead.model import HeadedModel

LETTERS = {letter: number for number, letter in enumerate("^abcdefgh", start=1)}


class Tokens:
    """A letter a token, padded on the left as decoders' tokenizers do."""

    def __call__(self, texts, return_tensors=None, padding=False, truncation=False, max_length=None):
        ids = [[LETTERS["^"], *(LETTERS[letter] for letter in text)] for text in texts]
        if truncation:
            ids = [one[:max_length] for one in ids]
        if return_tensors is None:
            return {"input_ids": ids}
        width = max(map(len, ids))
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in ids])
        return {"input_ids": torch.tensor([[0] * (width - len(one)) + one for one in ids]), "attention_mask": mask}


@pytest.fixture(scope="module")
def decoder():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = HeadedModel(LlamaForCausalLM(LlamaConfig(vocab_size=12, max_position_embeddings=32, **shape)).eval())
    model.__dict__["tokenizer"] = Tokens()
    return model


def test_next_token_is_the_mean_log_likelihood_whatever_the_batch(decoder):
    texts = ["abc", "hgfedcba", "de", "abcdefgh"]
    together, alone = NextToken(texts, max_tokens=6, batch_size=4), NextToken(texts, max_tokens=6, batch_size=1)
    found = run_task(together, decoder)
    np.testing.assert_allclose(found, run_task(alone, decoder), atol=1e-5)
    assert (together.cut, alone.cut) == (2, 2)
    ids = torch.tensor([[1, *(LETTERS[letter] for letter in "hgfed")]])
    with torch.no_grad():
        logits = decoder(input_ids=ids).logits.double()
    expected = torch.log_softmax(logits[0, :-1], -1)[torch.arange(5), ids[0, 1:]].mean()
    assert found[1] == pytest.approx(float(expected), abs=1e-5)
    assert together.quality(found, np.array([0, 0, 3])) == pytest.approx((2 * found[0] + found[3]) / 3)


def test_next_token_needs_logits():
    with pytest.raises(InputError, match="lm_head=True"):
        NextToken(["a"]).predict(SimpleNamespace(last_hidden_state=None), Batch({}, {}, 1))
    with pytest.raises(InputError, match="no texts"):
        NextToken([])


def test_pairs_are_pooled_over_real_tokens_and_judged_by_rank():
    pairs = SentencePairs("toy", [("a", "b")] * 3, np.array([0.0, 2.5, 5.0]), ["g"] * 3)
    task = PairSimilarity(pairs)
    states = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]] * 3)
    batch = Batch({"attention_mask": mask}, {"gold": torch.tensor(pairs.gold)}, 3)
    found = task.predict(SimpleNamespace(last_hidden_state=states), batch)
    for row in range(3):
        a, b = states[2 * row].double().mean(0), states[2 * row + 1, :2].double().mean(0)
        assert float(found[row]) == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)
    np.testing.assert_allclose(task.loss(found, batch), (found.numpy() - pairs.gold / 5) ** 2, atol=1e-6)
    values = np.array([0.3, 0.1, 0.9])
    assert task.quality(values, np.arange(3)) == pytest.approx(spearmanr(values, pairs.gold).statistic)


def test_repeating_a_batch_keeps_the_rows_of_an_example_together():
    batch = Batch({"x": torch.arange(4)[:, None]}, {"y": torch.tensor([7, 8])}, 2).repeat(3)
    assert batch.examples == 6
    assert batch.inputs["x"][:, 0].tolist() == [0, 1, 2, 3] * 3
    assert batch.targets["y"].tolist() == [7, 8] * 3
    task = FunctionTask([batch], lambda outputs, given: outputs)
    assert task.loss(torch.tensor([2.0]), batch).tolist() == [-2.0]
