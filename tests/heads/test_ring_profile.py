"""Ring profiles against loops over pairs of patches, and a tower that attends evenly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny import inputs_for, tiny, tower_of

import polyhead
from polyhead.errors import InputError
from polyhead.heads.ring_profile import PatchDistance, ring_profile

PREFIX = {"vit": 1, "deit": 2, "dinov2": 1, "clip-vision": 1, "siglip-vision": 0}


@pytest.mark.parametrize("family", list(PREFIX))
def test_the_profile_is_its_definition(family):
    model = polyhead.load(tiny(family), tower=tower_of(family))
    images = inputs_for(family, batch=3)["pixel_values"]
    found = ring_profile(model, images, batch_size=2)
    with model.record("attention") as recording, torch.no_grad():
        model(pixel_values=images)
    weights = recording.attention.double().numpy()
    n, before = 16, PREFIX[family]
    assert weights.shape[-1] == n + before
    rings, other, moved = np.zeros((2, 4, 4)), np.zeros((2, 4)), np.zeros((2, 4))
    pairs = np.zeros(4)
    for i in range(n):
        for j in range(n):
            down, across = abs(i // 4 - j // 4), abs(i % 4 - j % 4)
            at = weights[:, :, :, before + i, before + j].mean(0)
            rings[..., max(down, across)] += at / n
            moved += at * math.hypot(down, across) / n
            pairs[max(down, across)] += 1
        other += weights[:, :, :, before + i, :before].sum(-1).mean(0) / n
    np.testing.assert_allclose(found.rings, rings, atol=1e-6)
    np.testing.assert_allclose(found.other, other, atol=1e-6)
    np.testing.assert_allclose(found.rings.sum(-1) + found.other, 1, atol=1e-5)
    np.testing.assert_allclose(found.per_patch, rings * n / pairs, atol=1e-6)
    np.testing.assert_allclose(found.distance, moved / rings.sum(-1), atol=1e-5)
    assert PatchDistance().score(model, images).values.shape == (2, 4)


def test_a_tower_without_queries_attends_evenly():
    module = tiny("vit")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "query" in name or "q_proj" in name:
                parameter.zero_()
    found = ring_profile(polyhead.load(module), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    np.testing.assert_allclose(found.per_patch, 1 / 17, atol=1e-6)
    np.testing.assert_allclose(found.other, 1 / 17, atol=1e-6)


def test_oblong_images_have_oblong_grids():
    model = polyhead.load(tiny("dinov2"))
    assert ring_profile(model, torch.randn(1, 3, 16, 32)).grid == (2, 4)


def test_refusals():
    model = polyhead.load(tiny("vit"))
    with pytest.raises(InputError, match="pixel values"):
        PatchDistance().score(model)
    with pytest.raises(InputError, match="patch_size"):
        ring_profile(polyhead.load(tiny("bert")), torch.randn(1, 3, 32, 32))
