"""Context scores against what plain recordings give, and the questions they are used on."""

from __future__ import annotations

import pytest
import torch

import polyhead
from polyhead.errors import InputError
from polyhead.heads.context import ContextAttention, ContextDivergence, context_span
from polyhead.heads.facts import CAPITALS, context_questions
from polyhead.model import HeadedModel

PAIRS = [("The door is red. ", "What colour is the door?"), ("Ann left early. ", "Who left?")]


@pytest.fixture(scope="module")
def model(minilm_path: str) -> HeadedModel:
    return polyhead.load(minilm_path)


def _recorded(model: HeadedModel, text: str, what: str) -> torch.Tensor:
    with model.record(what) as recording, torch.no_grad():
        model(**model.tokenize([text]))
    return getattr(recording, what)[0].double()


def test_divergence_is_the_distance_at_the_last_token(model: HeadedModel) -> None:
    totals = {"l2": 0.0, "relative": 0.0, "cosine": 0.0}
    for context, question in PAIRS:
        given, without = (_recorded(model, text, "heads")[:, :, -1] for text in (context + question, question))
        length = (given - without).pow(2).sum(-1).sqrt()
        norms = given.pow(2).sum(-1).sqrt(), without.pow(2).sum(-1).sqrt()
        totals["l2"] += length / 2
        totals["relative"] += length / norms[1] / 2
        totals["cosine"] += (1 - (given * without).sum(-1) / norms[0] / norms[1]) / 2
    for distance, expected in totals.items():
        found = ContextDivergence(distance).score(model, PAIRS)  # type: ignore[arg-type]
        torch.testing.assert_close(torch.tensor(found.values), expected, atol=1e-5, rtol=1e-4)
    same = ContextDivergence().score(model, [("", "Who left?")])
    assert same.values.max() < 1e-6


def test_attention_on_the_context_is_summed_over_its_tokens(model: HeadedModel) -> None:
    expected = 0.0
    for context, question in PAIRS:
        inside = len(model.tokenizer(context, add_special_tokens=False)["input_ids"])
        assert context_span(model, context, question) == (1, 1 + inside)
        expected += _recorded(model, context + question, "attention")[:, :, -1, 1 : 1 + inside].sum(-1) / 2
    found = ContextAttention().score(model, PAIRS)
    torch.testing.assert_close(torch.tensor(found.values), expected, atol=1e-5, rtol=1e-4)


def test_other_data_is_refused(model: HeadedModel) -> None:
    for data in (None, [], [("a", "b", "c")]):
        with pytest.raises(InputError, match="list of"):
            ContextAttention().score(model, data)
    with pytest.raises(InputError, match="distance is 'l1'"):
        ContextDivergence("l1").score(model, PAIRS)  # type: ignore[arg-type]


def test_questions_contradict_what_is_known() -> None:
    questions = context_questions(40, seed=3)
    assert questions == context_questions(40, seed=3)
    for each in questions:
        country = each.question.removeprefix("The capital of ").removesuffix(" is")
        assert each.known == f" {CAPITALS[country]}" != each.given
        assert each.given in each.context
        assert country in each.context
        assert each.known.strip() not in each.context
