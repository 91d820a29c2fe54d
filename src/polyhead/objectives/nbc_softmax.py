"""NBC-Softmax: the mean vectors of a batch's classes are pushed apart, beside a classification loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.objectives.proxies import ProxyNCALoss, ProxyObjective
from polyhead.objectives.similarity import DotProductSimilarity
from polyhead.papers import paper

__all__ = ["NBCSoftmax", "block_contrast"]


@paper("nbc-softmax")
def block_contrast(embeddings: Tensor, labels: Tensor, *, tau: float = 0.2) -> Tensor:
    """``mean_c log sum_c' e^{tau cos(mu_c, mu_c')}`` over the mean vectors of the classes in a batch.

    The cosine of a class with itself counts as 0. ``tau`` multiplies, as in the paper's code.

    Args:
        embeddings: ``[n, d]``.
        labels: ``[n]`` integers.
        tau: sharpness.

    Example:
        >>> import torch
        >>> from polyhead.objectives import block_contrast
        >>> round(block_contrast(torch.eye(2), torch.tensor([0, 1])).item(), 4)  # log 2: orthogonal
        0.6931
    """
    if len(labels) != len(embeddings):
        raise InputError(f"{len(embeddings)} embeddings need {len(embeddings)} labels, got {len(labels)}.")
    present, index = labels.unique(return_inverse=True)
    member = nn.functional.one_hot(index, len(present)).to(embeddings.dtype)
    means = nn.functional.normalize(member.T @ embeddings / member.sum(0)[:, None], dim=1)
    cosine = means @ means.T
    own = torch.eye(len(present), dtype=torch.bool, device=cosine.device)
    return (tau * cosine.masked_fill(own, 0.0)).logsumexp(1).mean()


@paper("nbc-softmax")
class NBCSoftmax(nn.Module):
    """``(1 - ratio) * classification + ratio * block contrast`` (paper nbc-softmax).

    Args:
        classes: of the labels.
        dim: of the embeddings.
        ratio: share of the block term.
        tau: see :func:`block_contrast`.
        projection: dimensions of a linear map before the class means are taken; None: none.
        classification: any objective of embeddings and labels; None: softmax cross-entropy with a learned vector a
            class.
        seed: of the start of what is learned.

    Example:
        >>> import torch
        >>> from polyhead.objectives import NBCSoftmax
        >>> NBCSoftmax(classes=3, dim=8)(torch.randn(4, 8), torch.tensor([0, 1, 2, 0])).ndim
        0
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        *,
        ratio: float = 0.1,
        tau: float = 0.2,
        projection: int | None = None,
        classification: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= ratio <= 1:
            raise InputError(f"ratio is {ratio}, expected 0 to 1.")
        self.ratio = ratio
        self.tau = tau
        softmax = ProxyObjective(ProxyNCALoss(), classes, dim, DotProductSimilarity(), seed=seed)
        self.classification = softmax if classification is None else classification
        self.projection: nn.Linear | None = None
        if projection is not None:
            self.projection = nn.Linear(dim, projection)
            start = torch.randn(projection, dim, generator=torch.Generator().manual_seed(seed + 1)) / dim**0.5
            self.projection.weight.data.copy_(start)

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """A scalar of embeddings ``[n, d]`` and labels ``[n]``."""
        projected = embeddings if self.projection is None else self.projection(embeddings)
        block = block_contrast(projected, labels, tau=self.tau)
        total: Tensor = (1 - self.ratio) * self.classification(embeddings, labels) + self.ratio * block
        return total
