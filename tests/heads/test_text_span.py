"""TextSpan: against its definition, planted texts, and the bounds it lies between."""

from __future__ import annotations

import pytest
import torch

from polyhead.errors import InputError
from polyhead.heads.text_span import text_span


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(outputs: torch.Tensor, candidates: torch.Tensor, k: int) -> tuple[list[int], list[float]]:
    """Sample by sample and text by text, with outputs and texts projected anew each time."""
    outputs = outputs - outputs.mean(0)
    whole = float(outputs.square().sum())
    rows = torch.linalg.pinv(outputs) @ outputs  # projector onto the row space
    texts = candidates @ rows
    picked, shares = [], []
    for _ in range(k):
        variance = [float(sum(torch.dot(output, text) ** 2 for output in outputs)) for text in texts]
        best = max(range(len(texts)), key=lambda text: variance[text])
        unit = texts[best] / texts[best].norm()
        outputs = outputs - torch.outer(outputs @ unit, unit)
        texts = texts - torch.outer(texts @ unit, unit)
        picked.append(best)
        shares.append(1 - float(outputs.square().sum()) / whole)
    return picked, shares


def low_rank(samples: int = 30, dim: int = 20, rank: int = 6) -> torch.Tensor:
    return random(samples, rank) @ random(rank, dim, seed=1) + 3  # a mean that must not count


def test_span_is_its_definition():
    outputs, candidates = low_rank(), random(40, 20, seed=2)
    found = text_span(outputs, candidates, 5)
    picked, shares = by_definition(outputs, candidates, 5)
    assert found.texts.tolist() == picked
    assert torch.allclose(found.explained, torch.tensor(shares).double(), atol=1e-9)
    assert text_span(outputs.float(), candidates.float(), 5).texts.tolist() == picked


def test_planted_texts_are_found_and_the_rank_ends_it():
    candidates = torch.linalg.qr(random(20, 20)).Q
    scale = torch.tensor([3.0, 2.0, 1.0]).double()
    outputs = random(50, 3, seed=4) * scale @ candidates[[7, 2, 11]]
    found = text_span(outputs, candidates, 10)
    assert found.texts.tolist() == [7, 2, 11]
    assert float(found.explained[-1]) == pytest.approx(1)


def test_span_lies_below_principal_components():
    outputs, candidates = low_rank(), random(200, 20, seed=5)
    singular = torch.linalg.svdvals(outputs - outputs.mean(0)).square()
    best = singular.cumsum(0) / singular.sum()
    for place, share in enumerate(text_span(outputs, candidates, 5).explained):
        assert 0 < float(share) <= float(best[place]) + 1e-9


def test_nothing_to_explain_and_refusals():
    assert text_span(torch.ones(5, 4), random(3, 4), 2).texts.tolist() == []
    assert text_span(low_rank(), torch.zeros(3, 20), 2).texts.tolist() == []
    with pytest.raises(InputError, match="expected"):
        text_span(low_rank(), random(3, 4), 2)
