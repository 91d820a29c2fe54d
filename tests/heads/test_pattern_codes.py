"""Codes of attention maps: planted patterns come apart, and the error is what its definition says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import inputs_for, tiny

from polyhead.errors import InputError
from polyhead.heads.pattern_codes import AttentionPatternAE, attention_maps
from polyhead.model import load


def _planted(size: int = 9, each: int = 20) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    first = torch.zeros(size, size)
    first[:, 0] = 5.0
    logits = torch.stack([5 * torch.eye(size), first, torch.zeros(size, size)]).repeat_interleave(each, 0)
    noise = 0.5 * torch.randn(logits.shape, generator=generator)
    return torch.softmax(logits + noise, -1), np.repeat(np.arange(3), each)


def test_planted_patterns_come_apart() -> None:
    maps, kind = _planted()
    coder = AttentionPatternAE(steps=150).fit(maps)
    labels = coder.cluster(maps, 3)
    assert coder.codes(maps).shape == (60, 2)
    for one in range(3):  # every cluster holds one pattern alone
        assert len(set(kind[labels == one])) == 1
    assert coder.error(maps) < 0.5


def test_error_of_a_mean_given_back_is_one() -> None:
    maps, _ = _planted()
    coder = AttentionPatternAE(steps=1, learning_rate=1e-12).fit(maps)
    assert coder._parts is not None
    with torch.no_grad():
        for parameter in coder._parts[1].parameters():
            parameter.zero_()
    assert coder.error(maps) == pytest.approx(1)


def test_the_same_seed_gives_the_same_codes_and_leaves_torch_alone() -> None:
    maps, _ = _planted(each=4)
    torch.manual_seed(5)
    first = AttentionPatternAE(steps=5).fit(maps).codes(maps)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)
    np.testing.assert_array_equal(AttentionPatternAE(steps=5).fit(maps).codes(maps), first)


def test_maps_are_the_models() -> None:
    model, inputs = load(tiny("vit")), inputs_for("vit")
    maps = attention_maps(model, inputs)
    with model.record("attention") as recording, torch.no_grad():
        model(**inputs)
    assert maps.shape == (2, 4, 2, 17, 17)
    torch.testing.assert_close(maps[1].transpose(0, 1), recording.layer_attention(1))


def test_what_is_no_map_is_refused() -> None:
    maps, _ = _planted(each=2)
    with pytest.raises(InputError, match="call fit"):
        AttentionPatternAE().codes(maps)
    with pytest.raises(InputError, match=r"expected \[n, queries, keys\]"):
        AttentionPatternAE().fit(maps[0])
    coder = AttentionPatternAE(steps=1).fit(maps)
    with pytest.raises(InputError, match="fitted to 81"):
        coder.codes(maps[:, :4])
    with pytest.raises(InputError, match="expected 1 to 6"):
        coder.cluster(maps, 7)
