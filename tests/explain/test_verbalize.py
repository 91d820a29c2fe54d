"""Token scores in words: the searches, what a text is read to say, and whether that is true."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from polyhead.errors import InputError
from polyhead.explain.base import Attribution
from polyhead.explain.statements import check_claims, phrases, read_claims, share
from polyhead.explain.verbalize import (
    conv_search,
    instruction,
    span_search,
    top_k_search,
    verbalize,
    verbalize_by,
)

WORDS = ["The", "striker", "scored", "a", "late", "goal", ",", "and", "the", "crowd", "sang"]
SCORES = [0.0, 0.30, 0.20, 0.0, 0.1, 0.40, -0.1, 0.0, 0.0, 0.05, -0.05]


def _scores() -> Attribution:
    return Attribution(WORDS, SCORES, "Sports")


def test_span_search_finds_every_run_above_the_mean() -> None:
    found = span_search(_scores(), 3)
    total, mean = np.abs(SCORES).sum(), np.mean(SCORES)
    expected = {
        run: sum(SCORES[i] for i in run) / total
        for length in (2, 3)
        for run in (tuple(range(i, i + length)) for i in range(len(WORDS) - length + 1))
        if np.mean([SCORES[i] for i in run]) > mean and "," not in (WORDS[run[0]], WORDS[run[-1]])
    }
    assert {one.positions: one.coverage for one in found} == pytest.approx(expected)
    assert [one.coverage for one in found] == sorted((one.coverage for one in found), reverse=True)
    high = span_search(_scores(), 3, quantile=0.9)
    assert {one.positions for one in high} < set(expected)
    assert all(np.mean([SCORES[i] for i in one.positions]) > np.quantile(SCORES, 0.9) for one in high)


def test_conv_search_keeps_the_best_filter_of_each_window() -> None:
    found = {one.positions for one in conv_search(_scores(), 5, 3)}
    expected = set()
    for first in range(len(WORDS) - 4):
        window = [i for i in range(first, first + 5) if WORDS[i] != ","]
        best = max(combinations(window, 3), key=lambda some: sum(SCORES[i] for i in some))
        if np.mean([SCORES[i] for i in best]) > np.mean(SCORES):
            expected.add(round(sum(SCORES[i] for i in best), 9))
    assert {round(sum(SCORES[i] for i in some), 9) for some in found} == expected
    assert (1, 2, 5) in found  # words between may be left out


def test_top_words_are_words_and_above_zero() -> None:
    assert top_k_search(_scores(), 2)[0].positions == (1, 5)
    only = Attribution(["!", "no", "yes"], [0.9, -0.5, 0.1])
    assert top_k_search(only, 2)[0].positions == (2,)
    assert top_k_search(Attribution(["no"], [-1.0])) == []


def test_templates_say_what_was_found() -> None:
    said = verbalize(_scores(), ("topk", "span", "conv", "order"), k=2, width=3)
    assert said.text == (
        "The words “striker” and “goal” are most important for Sports (58% of all attribution). "
        "The phrase “striker scored” is the most important one of its length (42%). "
        "Close together, “scored”, “late” and “goal” also matter (58%). "
        "From most to least important: “goal”, “striker”."
    )
    assert share(_scores(), [1, 5]) == pytest.approx(0.7 / 1.2)
    assert len(said.claims) == 4
    assert said.check.faithfulness == 1


@pytest.mark.parametrize("seed", range(40))
def test_templates_are_true_whatever_the_scores(seed: int) -> None:
    generator = np.random.default_rng(seed)
    vocabulary = ["the", "bank", "rose", ".", ",", "“", "a", "--", "7", "river", "0.5", "%", "loan"]
    tokens = [vocabulary[i] for i in generator.integers(len(vocabulary), size=25)]
    scores = generator.normal(size=25) * (generator.random(25) < 0.7)
    scores[generator.integers(25)] = np.nan
    quantile = [None, 0.2, 0.9][seed % 3]
    said = verbalize(
        Attribution(tokens, scores, ["Sci/Tech", "Bank"][seed % 2]),
        ("topk", "span", "conv", "order"),
        quantile=quantile,
    )
    assert said.claims or said.text.startswith("No word")
    assert said.check.reasons == [""] * len(said.claims), said.text


def test_statements_are_read() -> None:
    text = (
        'The most important word is "goal" (33%), then "striker" with 25.0 percent. "The" and "and" are not '
        "important. Its score of “late” is 0.10. “Sports” is the label. In order of importance: «goal», «scored»."
    )
    found = read_claims(text, _scores())
    assert [(one.words, one.says) for one in found] == [
        (("goal",), "most important"),
        (("striker",), "important"),
        (("The", "and"), "unimportant"),
        (("late",), "important"),
        (("goal", "scored"), "order"),
    ]
    assert (found[0].percent, found[1].percent, found[3].score) == ((33, 0.5), (25, 0.05), (0.1, 0.005))
    assert check_claims(found, _scores()).truths == [True, True, True, True, True]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('"penalty" is important.', "not in the text: penalty"),
        ('"striker" is the most important word.', "other words have a larger sum"),
        ('"late goal" is the most important phrase.', ""),
        ('"a late" is the most important phrase.', "other words have a larger sum"),
        ('"the" is important.', "not above the mean"),
        ('"goal" is not important.', "above the mean"),
        ('"goal" has 40% of all attribution.', "40% is said, 33.3% is right"),
        ('"goal" has a score of 0.41.', "0.41 is said, 0.4 is right"),
        ('In order of importance: "striker", "goal".', "the order is another"),
    ],
)
def test_what_is_wrong_is_said(text: str, reason: str) -> None:
    # "late goal" 0.5 equals "striker scored" 0.5: either may be called the most important.
    assert check_claims(read_claims(text, _scores()), _scores()).reasons == [reason]


def test_each_clause_speaks_for_itself() -> None:
    text = 'The most important word is "late" (40%), while "the" is not important; "goal" matters.'
    found = read_claims(text, _scores())
    assert [one.says for one in found] == ["most important", "unimportant", "important"]
    first = "other words have a larger sum; 40% is said, 8.3% is right"
    assert check_claims(found, _scores()).reasons == [first, "", ""]


def test_a_number_is_held_to_its_last_digit() -> None:
    third = Attribution(["goal", "late", "win"], [1.0, 1.0, 1.0])
    for text, true in (("33%", True), ("33.3%", True), ("33.0%", False), ("34%", False)):
        claims = read_claims(f'"goal" and nothing has {text}.', third)
        assert ("said" not in check_claims(claims, third).reasons[0]) == true
    loose = check_claims(read_claims('"goal" is the most important with 34%.', third), third, tolerance=1)
    assert loose.truths == [True]


def test_a_language_model_is_checked() -> None:
    asked: list[str] = []

    def model(prompt: str) -> str:
        asked.append(prompt)
        return 'goal" with 0.40. The word "offside" helped too.'

    said = verbalize_by(model, _scores(), "name the topic")
    assert asked[0] == instruction(_scores(), "name the topic")
    assert "goal: 0.40" in asked[0]
    assert said.check.truths == [True, False]
    assert said.check.faithfulness == 0.5


def test_nothing_to_say() -> None:
    flat = verbalize(Attribution(["a", "b", "c"], [0.0, 0.0, 0.0], "World"))
    assert flat.text == "No word stands out for World."
    assert np.isnan(flat.check.faithfulness)
    assert phrases(Attribution(["a", "b"], [np.nan, 1.0]), 2) == []


def test_refusals() -> None:
    with pytest.raises(InputError, match="expected some of topk"):
        verbalize(_scores(), ("heatmap",))
    with pytest.raises(InputError, match="nothing to say"):
        verbalize(Attribution(["a"], [np.nan]))
    with pytest.raises(InputError, match="width=1"):
        span_search(_scores(), 1)
    with pytest.raises(InputError, match="quantile"):
        conv_search(_scores(), quantile=2)
    with pytest.raises(InputError, match="size=6"):
        conv_search(_scores(), 5, 6)


@pytest.mark.real_model
def test_a_real_encoder_in_words(minilm_path: str) -> None:
    import torch

    import polyhead
    from polyhead.explain.base import ClassReadout
    from polyhead.explain.baselines import LeaveOneOut

    model = polyhead.load(minilm_path)
    names = ["sports", "business"]
    shown = ["The team won the match.", "The company's profit fell."]
    with torch.no_grad():
        weight = torch.stack([model(**model.tokenize([one])).last_hidden_state[0].mean(0) for one in shown])
    text = "The striker scored unbelievably, said the newspaper."
    found = LeaveOneOut().text(ClassReadout(model, weight, torch.zeros(2), names), text)
    assert found.target == "sports"
    assert np.isnan(found.scores[[0, -1]]).all()  # [CLS] and [SEP]
    words = found.words(text, model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"])
    assert words.tokens == ["The", "striker", "scored", "unbelievably", ",", "said", "the", "newspaper", "."]
    assert words.scores.sum() == pytest.approx(np.nansum(found.scores))
    said = verbalize(words)
    assert "“striker”" in said.text
    assert said.check.faithfulness == 1
