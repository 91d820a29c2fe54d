"""Influence of heads on texts: against attention weights made uniform by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import GROUPED

from polyhead.errors import InputError
from polyhead.heads.attention_influence import AttentionInfluence, uniform_attention
from polyhead.heads.importance import task_losses
from polyhead.heads.suffix import every_head
from polyhead.heads.tasks import NextToken
from polyhead.model import HeadedModel


class Decoder(HeadedModel):
    """A tiny decoder whose tokens are the numbers in a text, padded on the right."""

    def tokenize(self, texts: object, **kwargs: object) -> dict[str, torch.Tensor]:
        rows = [[int(word) for word in text.split()] for text in texts]  # type: ignore[attr-defined]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}


TEXTS = ["5 9 17 5 9 17 8", "3 4 5 6", "90 80 70 60 50 40"]


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request: pytest.FixtureRequest) -> HeadedModel:
    import transformers

    torch.manual_seed(0)
    name, extra = {"llama": ("Llama", {}), "mistral": ("Mistral", {"sliding_window": 3})}[request.param]
    config = getattr(transformers, f"{name}Config")(**GROUPED, **extra, initializer_range=0.3)
    return Decoder(getattr(transformers, f"{name}ForCausalLM")(config).eval())


def test_heads_attend_alike_and_others_do_not_change(model: HeadedModel) -> None:
    inputs = model.tokenize(TEXTS)
    with torch.no_grad():
        with model.record("attention", layers=[0]) as plain:
            model(**inputs)
        with uniform_attention(model, [(0, 2)]), model.record("heads", "attention", layers=[0]) as changed:
            model(**inputs)
    weights, window = changed.attention[:, 0], model.attention_layers[0].sliding_window
    for row, text in enumerate(TEXTS):
        for query in range(len(text.split())):
            seen = min(query + 1, window or 99)
            expected = torch.zeros(7)
            expected[query + 1 - seen : query + 1] = 1 / seen
            torch.testing.assert_close(weights[row, 2, query], expected)
    real = inputs["attention_mask"].bool()
    others = [0, 1, 3]
    torch.testing.assert_close(
        weights[:, others].movedim(1, 2)[real], plain.attention[:, 0, others].movedim(1, 2)[real]
    )


@pytest.mark.parametrize("ablation", ["uniform", "zero"])
def test_the_score_of_a_head_is_that_of_texts_without_it(model: HeadedModel, ablation: str) -> None:
    scorer = AttentionInfluence(ablation)  # type: ignore[arg-type]
    values = scorer.score(model, TEXTS).values
    for layer, head in every_head(model):
        alone = scorer.of_texts(model, TEXTS, [(layer, head)])
        assert values[layer, head] == pytest.approx(alone.mean(), abs=1e-6)
        assert np.abs(alone).max() > 1e-6


def test_the_influence_is_relative_and_by_text(model: HeadedModel) -> None:
    heads = [(0, 1), (1, 3)]
    together = AttentionInfluence().of_texts(model, TEXTS, heads)
    for text, value in zip(TEXTS, together, strict=True):
        task = NextToken([text])
        whole = task_losses(model, task)[0]
        with uniform_attention(model, heads):
            without = task_losses(model, task)[0]
        assert value == pytest.approx((without - whole) / whole, abs=1e-5)


def test_other_data_is_refused(model: HeadedModel) -> None:
    with pytest.raises(InputError, match="list of texts"):
        AttentionInfluence().score(model, "one text")
    with pytest.raises(InputError, match="'uniform' or 'zero'"):
        AttentionInfluence("half").score(model, TEXTS)  # type: ignore[arg-type]


def test_the_top_fraction_is_taken_within_domains() -> None:
    values = np.array([0.1, 0.5, 0.2, 0.9, 0.3, 0.4])
    assert AttentionInfluence.select(values, 0.5).tolist() == [3, 1, 5]
    domains = ["web", "code", "web", "code", "web", "code"]
    assert AttentionInfluence.select(values, 1 / 3, domains).tolist() == [3, 4]
    with pytest.raises(InputError, match="one a text"):
        AttentionInfluence.select(values, 0.5, ["web"])
