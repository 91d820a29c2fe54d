"""Terms of the embeddings alone that go with a similarity."""

from __future__ import annotations

from torch import Tensor

from polyhead.objectives.base import Regularizer
from polyhead.papers import paper

__all__ = ["ZeroMeanRegularizer"]


@paper("snr-distance")
class ZeroMeanRegularizer(Regularizer):
    """``weight * mean_i |sum_m h_im|``: keeps the features of each vector at mean zero (paper snr-distance, eq. 6).

    With it the noise-to-signal ratio stays a squared distance over the anchor's squared length.

    Args:
        weight: of the term.
    """

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, embeddings: Tensor) -> Tensor:
        """A scalar of embeddings ``[n, d]``."""
        return self.weight * embeddings.sum(-1).abs().mean()
