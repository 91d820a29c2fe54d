"""Where the heads of a vision tower look: how much attention falls on each ring of patches around a patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Progress, Score
from polyhead.heads.streaming import Pattern, stream_attention
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["PatchDistance", "RingProfile", "ring_profile"]


@dataclass(frozen=True)
class RingProfile:
    """Attention of the patches, averaged over patches and images.

    Attributes:
        rings: ``[layers, heads, rings]``: attention that falls on the patches of ring 0 (the patch itself), 1 (its
            eight neighbours), 2 and so on.
        per_patch: the same divided among the patches of a ring: mean weight of a pair of patches at that distance.
        other: ``[layers, heads]``: attention on tokens that are no patches ([CLS], registers); with the rings it
            sums to 1.
        distance: ``[layers, heads]``: mean straight-line distance in patches, of the attention on patches.
        grid: rows and columns of patches.
        images: how many.
    """

    rings: np.ndarray
    per_patch: np.ndarray
    other: np.ndarray
    distance: np.ndarray
    grid: tuple[int, int]
    images: int


@paper("vit-attention-visual-analytics")
def ring_profile(
    model: HeadedModel, images: torch.Tensor, *, batch_size: int = 8, progress: Progress | None = None
) -> RingProfile:
    """Ring profile of every head (vit-attention-visual-analytics, the strength view), one layer at a time.

    Ring ``r`` of a patch holds the patches whose row or column differs by ``r`` and neither by more. Patches follow
    ``[CLS]`` and register tokens row by row, as in ViT, DeiT, DINOv2, CLIP and SigLIP.

    Args:
        model: a vision tower.
        images: pixel values ``[n, channels, height, width]`` as the model takes them.
        batch_size: images a batch.

    Raises:
        InputError: something else than images, or a model whose tokens are not a grid of patches.
    """
    grid = _grid(model, images)
    rows, columns = (part.flatten().double() for part in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    down, across = (rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()
    ring = torch.maximum(down, across).long()
    straight = (down**2 + across**2).sqrt()
    count = max(grid)
    mass = torch.zeros(model.layers, model.heads, count, dtype=torch.float64)
    moved, other = (torch.zeros(model.layers, model.heads, dtype=torch.float64) for _ in range(2))
    for first in range(0, len(images), batch_size):

        def visit(pattern: Pattern) -> None:
            weights = pattern.weights.double().cpu()
            before = weights.shape[-1] - len(ring)
            if before < 0:
                raise InputError(f"'{model.name}' has {weights.shape[-1]} tokens for {len(ring)} patches: no grid.")
            patches = weights[:, :, before:]  # queries: patches only
            pairs = patches[..., before:].sum(0)  # [heads, patches, patches]
            heads = pairs.shape[0]
            mass[pattern.layer, :heads].index_add_(1, ring.flatten(), pairs.flatten(1))
            moved[pattern.layer, :heads] += (pairs * straight).sum((1, 2))
            other[pattern.layer, :heads] += patches[..., :before].sum((0, 2, 3))

        stream_attention(model, {"pixel_values": images[first : first + batch_size].to(model.device)}, visit)
        if progress is not None:
            progress(min(first + batch_size, len(images)), len(images))
    asked = len(images) * len(ring)
    pairs_at = torch.bincount(ring.flatten(), minlength=count) * len(images)
    return RingProfile(
        (mass / asked).numpy(),
        (mass / pairs_at).numpy(),
        (other / asked).numpy(),
        (moved / mass.sum(-1)).numpy(),
        grid,
        len(images),
    )


def _grid(model: HeadedModel, images: Any) -> tuple[int, int]:
    if not isinstance(images, torch.Tensor) or images.dim() != 4 or not len(images):
        raise InputError(
            "Vision scores take pixel values [images, channels, height, width] as the model takes them; got "
            f"{list(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__}."
        )
    size = getattr(model.config, "patch_size", None)
    if size is None:
        raise InputError(f"'{model.name}' has no patch_size in its configuration: it is no tower of patches.")
    down, across = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    return images.shape[2] // down, images.shape[3] // across


@paper("vit-attention-visual-analytics")
@dataclass
class PatchDistance(Score):
    """Mean distance, in patches, between a patch and the patches a head attends to; see :func:`ring_profile`.

    Args:
        batch_size: images a batch.

    Example:
        >>> import polyhead, torch
        >>> from transformers import ViTConfig, ViTModel
        >>> config = ViTConfig(image_size=32, patch_size=8, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
        >>> PatchDistance().score(polyhead.load(ViTModel(config)), torch.randn(2, 3, 32, 32)).shape
        (2, 4)
    """

    name: ClassVar[str] = "patch-distance"
    summary: ClassVar[str] = "mean distance in patches to what a head of a vision tower attends to"
    needs: ClassVar[Any] = "images"
    higher_means: ClassVar[str] = "looks further across the image"

    batch_size: int = 8

    def score(
        self, model: HeadedModel, data: torch.Tensor | Sequence[Any] | None = None, *, progress: Progress | None = None
    ) -> HeadMap:
        """See :class:`Score`; data are pixel values ``[images, channels, height, width]``, there is no default."""
        images: Any = data
        profile = ring_profile(model, images, batch_size=self.batch_size, progress=progress)
        return self._map(profile.distance, model, f"{profile.images} images")
