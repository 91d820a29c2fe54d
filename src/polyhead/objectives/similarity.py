"""How alike vectors are: every similarity gives a matrix in which more is closer, and any loss takes it."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = [
    "AngleSimilarity",
    "CosineSimilarity",
    "DotProductSimilarity",
    "EuclideanSimilarity",
    "SNRSimilarity",
    "Similarity",
]


class Similarity(nn.Module):
    """Compares vectors ``[..., n, d]`` with ``[..., m, d]``; distances are given with a minus, so that more is closer.

    Half precision is computed in float32. A subclass writes :meth:`matrix`, which broadcasts over leading dimensions.
    """

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Similarities ``[..., n, m]``; of ``x`` with itself where ``y`` is None.

        Raises:
            InputError: vectors of two sizes, or something other than vectors in rows.
        """
        y = x if y is None else y
        if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1]:
            raise InputError(
                f"Vectors of shape {tuple(x.shape)} and {tuple(y.shape)} cannot be compared: expected [n, d], [m, d]."
            )
        return self.matrix(_wide(x), _wide(y))

    def paired(self, x: Tensor, y: Tensor) -> Tensor:
        """Similarity ``[n]`` of the i-th of ``x [n, d]`` with the i-th of ``y [n, d]``."""
        if x.shape != y.shape:
            raise InputError(f"Pairs need as many vectors on each side, got {tuple(x.shape)} and {tuple(y.shape)}.")
        return self(x.unsqueeze(-2), y.unsqueeze(-2))[..., 0, 0]

    @abstractmethod
    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """``[..., n, m]`` of ``[..., n, d]`` and ``[..., m, d]``, in float32 or float64."""


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class CosineSimilarity(Similarity):
    """Dot product of unit vectors.

    Example:
        >>> import torch
        >>> from polyhead.objectives import CosineSimilarity
        >>> CosineSimilarity()(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])).tolist()
        [[1.0, 0.0]]
    """

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Similarity`."""
        return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(y, dim=-1).transpose(-1, -2)


class DotProductSimilarity(Similarity):
    """Dot product of the vectors as they are."""

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Similarity`."""
        return x @ y.transpose(-1, -2)


class EuclideanSimilarity(Similarity):
    """Minus the Euclidean distance.

    Args:
        squared: minus its square.
        normalize: of unit vectors.
    """

    def __init__(self, *, squared: bool = False, normalize: bool = False) -> None:
        super().__init__()
        self.squared = squared
        self.normalize = normalize

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Similarity`."""
        if self.normalize:
            x, y = nn.functional.normalize(x, dim=-1), nn.functional.normalize(y, dim=-1)
        if not self.squared:
            return -torch.cdist(x, y)
        return -squared_distance(x, y)


@paper("snr-distance")
class SNRSimilarity(Similarity):
    """Minus the noise-to-signal ratio ``var(y - x) / var(x)``, the anchor ``x`` being the signal (paper snr-distance).

    Not symmetric, and blind to what is added to all features of a vector. For vectors of mean zero it is
    ``|x - y|^2 / |x|^2``; :class:`polyhead.objectives.ZeroMeanRegularizer` keeps them so.

    Example:
        >>> import torch
        >>> from polyhead.objectives import SNRSimilarity
        >>> SNRSimilarity()(torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, -2.0]])).tolist()
        [[-1.0]]
    """

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Similarity`."""
        x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
        return -squared_distance(x, y) / x.square().sum(-1).unsqueeze(-1)


class AngleSimilarity(Similarity):
    """Absolute sum of the parts of ``x / y`` as complex vectors (AnglE, arXiv 2309.12871).

    The first half of the features is read as the real part, the second as the imaginary part (an odd last feature
    has none). With unit vectors that sum is cosine plus a sine, which does not flatten where the cosine does.
    """

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Similarity`."""
        if x.shape[-1] % 2:
            x, y = nn.functional.pad(x, (0, 1)), nn.functional.pad(y, (0, 1))
        x, y = nn.functional.normalize(x, dim=-1), nn.functional.normalize(y, dim=-1)
        real, imaginary = y.chunk(2, -1)
        turned = torch.cat((real - imaginary, imaginary + real), -1)
        return (x @ turned.transpose(-1, -2)).abs()


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2`` as ``[..., n, m]``, by one matrix product; never below 0."""
    products = x @ y.transpose(-1, -2)
    return (x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2) - 2 * products).clamp(min=0)
