"""Matryoshka in width and depth: against the definition and sentence-transformers; cutting; the grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from tiny import tiny
from training_parts import pairs, tiny_encoder

from polyhead.embed import Encoder
from polyhead.errors import InputError
from polyhead.objectives import CoSENTLoss, InfoNCE, Objective
from polyhead.training import (
    Matryoshka,
    ObjectiveLoss,
    Options,
    Starbucks,
    Trainer,
    TwoDMatryoshka,
    embed_layers,
    grid_report,
    shorten,
)

COLUMNS = [["the river", "a bridge", "iron"], ["it runs", "a town of stone", "cost"]]
SCORES = torch.tensor([0.1, 0.9, 0.4])


def features(model: Any) -> list[dict[str, Any]]:
    return [model.preprocess(column) for column in COLUMNS]


def gradient(model: Any, value: torch.Tensor) -> torch.Tensor:
    parameters = [value for value in model.parameters() if value.requires_grad]
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return torch.cat([piece.ravel() for piece in pieces])


def test_matryoshka_is_that_of_sentence_transformers(encoder: Any) -> None:
    for labels, ours, theirs in (
        (None, InfoNCE(temperature=0.05), losses.MultipleNegativesRankingLoss(encoder)),
        (SCORES, CoSENTLoss(temperature=0.05), losses.CoSENTLoss(encoder)),
    ):
        expected = losses.MatryoshkaLoss(encoder, theirs, [8, 16, 32], [0.5, 1.0, 2.0])(features(encoder), labels)
        loss = ObjectiveLoss(encoder, Matryoshka(ours, [8, 16, 32], [0.5, 1.0, 2.0]))
        found = loss(features(encoder), labels)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(gradient(encoder, found), gradient(encoder, expected), atol=1e-5, rtol=1e-4)


def test_2dmse_is_that_of_sentence_transformers(encoder: Any) -> None:
    theirs = losses.Matryoshka2dLoss(
        encoder,
        losses.CoSENTLoss(encoder),
        [8, 32],
        n_layers_per_step=-1,
        n_dims_per_step=-1,
        prior_layers_weight=0.7,
        kl_div_weight=0.4,
        kl_temperature=0.3,
    )
    expected = theirs(features(encoder), SCORES)
    # Theirs counts the embeddings as a layer to train.
    ours = TwoDMatryoshka(
        CoSENTLoss(), [8, 32], layers=[0, 1, 2], draws=None, prior_weight=0.7, kl_weight=0.4, temperature=0.3
    )
    found = ObjectiveLoss(encoder, ours)(features(encoder), SCORES)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(gradient(encoder, found), gradient(encoder, expected), atol=1e-4, rtol=1e-3)


def test_starbucks_is_its_definition() -> None:
    torch.manual_seed(1)
    made = [
        {layer: torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for layer in (1, 2, 3)} for _ in range(2)
    ]
    sizes, weight, t = [(1, 2), (2, 4), (3, 6)], 0.5, 0.3
    grades = torch.tensor([0.0, 1.0, 2.0, 1.5], dtype=torch.float64)

    def cosent(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        s = torch.cosine_similarity(first, second) / 0.05
        total = sum(torch.exp(s[j] - s[i]) for i in range(4) for j in range(4) if grades[i] > grades[j])
        return torch.log(1 + total)

    value, pull = 0.0, 0.0
    for layer, width in sizes:
        value = value + cosent(*(column[layer][:, :width] for column in made)) / 3
        if layer < 3:
            own = torch.cat([column[layer][:, :width] for column in made])
            top = torch.cat([column[3][:, :width] for column in made]).detach()
            q, p = torch.softmax(top / t, 1), torch.softmax(own / t, 1)
            pull = pull + t * (q * (q / p).log()).sum(1).mean() / 2
    expected = value + weight * pull
    found = Starbucks(CoSENTLoss(temperature=0.05), sizes, kl_weight=weight, temperature=t)(made, grades)
    torch.testing.assert_close(found, expected)
    leaves = [column[layer] for column in made for layer in (1, 2, 3)]
    ours, right = torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves)
    for one, two in zip(ours, right, strict=True):
        torch.testing.assert_close(one, two)


def test_layers_are_drawn_by_torch_and_checked() -> None:
    objective = TwoDMatryoshka(InfoNCE(), [8], draws=2)
    torch.manual_seed(0)
    drawn = [objective.draw(6) for _ in range(40)]
    torch.manual_seed(0)
    assert drawn == [objective.draw(6) for _ in range(40)]
    assert all(each[0] == 6 and len(set(each)) == 3 for each in drawn)
    assert {layer for each in drawn for layer in each[1:]} == {1, 2, 3, 4, 5}
    with pytest.raises(InputError, match="the model has 6"):
        TwoDMatryoshka(InfoNCE(), [8], layers=[6]).draw(6)
    with pytest.raises(InputError, match="end it there"):
        Starbucks(InfoNCE(), [(1, 8), (2, 32)]).draw(3)
    with pytest.raises(InputError, match="small to large"):
        Starbucks(InfoNCE(), [(2, 8), (1, 32)])
    with pytest.raises(InputError, match="cannot be cut to 64"):
        Matryoshka(InfoNCE(), [64])(torch.randn(2, 32), other=torch.randn(2, 32))
    with pytest.raises(InputError, match="a weight each"):
        Matryoshka(InfoNCE(), [8, 16], [1.0])


def test_a_cut_model_gives_its_layer_and_opens_anywhere(encoder: Any, tmp_path: Path) -> None:
    texts = COLUMNS[1]
    cut = shorten(encoder, layers=2, dim=8)
    with torch.no_grad():
        layer = embed_layers(encoder, encoder.preprocess(texts), [0, 2])[2]
    expected = torch.nn.functional.normalize(layer[:, :8], dim=-1).numpy()
    np.testing.assert_allclose(cut.encode(texts), expected, atol=1e-6)
    assert len(cut[0].auto_model.encoder.layer) == 2
    assert len(encoder[0].auto_model.encoder.layer) == 3
    cut.save_pretrained(str(tmp_path / "cut"), create_model_card=False)
    plain = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    np.testing.assert_allclose(plain.encode(texts), expected, atol=1e-6)
    np.testing.assert_allclose(Encoder(str(tmp_path / "cut"), backend="torch").encode(texts).dense, expected, atol=1e-5)
    with pytest.raises(InputError, match="has 3"):
        shorten(encoder, layers=4)
    with pytest.raises(InputError, match="were to be cut to 64"):
        shorten(encoder, dim=64)


def test_a_norm_after_the_last_layer_is_noticed(encoder: Any) -> None:
    body = encoder[0]
    body.model = tiny("llama", vocab_size=30, num_hidden_layers=3, pad_token_id=0)
    assert shorten(encoder, layers=3, dim=8).get_embedding_dimension() == 8
    with pytest.raises(InputError, match="something stands behind the last layer"):
        shorten(encoder, layers=2)


def test_training_in_two_dimensions_and_its_grid() -> None:
    data = pairs(8)
    for objective in (
        TwoDMatryoshka(InfoNCE(), [8, 32]),
        Starbucks(Objective(InfoNCE()), [(1, 8), (3, 32)]),
    ):
        options = Options(batch_size=8, steps=2, learning_rate=1e-3, warmup=0, device="cpu")
        model = Trainer(objective, options=options).fit(tiny_encoder(), data).model_
        assert not torch.equal(model[0].auto_model.encoder.layer[0].output.dense.weight, _start())
    grid = grid_report(model, lambda cut: float(cut.get_embedding_dimension()), [1, 3], [8, 32], ["one", "two"], runs=1)
    assert [(each.layers, each.dim, each.score, each.bytes) for each in grid] == [
        (1, 8, 8.0, 32), (1, 32, 32.0, 128), (3, 8, 8.0, 32), (3, 32, 32.0, 128)
    ]  # fmt: skip
    assert all(each.seconds > 0 for each in grid)
    with pytest.raises(InputError, match="runs the model itself"):
        Trainer(objective, options=Options(cached=2, device="cpu")).fit(model, data)


def _start() -> torch.Tensor:
    weight: torch.Tensor = tiny_encoder()[0].auto_model.encoder.layer[0].output.dense.weight
    return weight
