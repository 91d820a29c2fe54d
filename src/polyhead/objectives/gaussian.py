"""Gaussians in place of points: hedged instance embeddings (paper hib) and Gaussian retrieval (multivariate-retrieval).

A diagonal Gaussian is one vector ``[mean | log variance]`` of twice the dimensions, so that every loss, miner and store
that takes vectors takes distributions.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.objectives.base import Loss, Regularizer, Terms
from polyhead.objectives.relation import Relation
from polyhead.objectives.similarity import Similarity
from polyhead.papers import paper

__all__ = [
    "GaussianHead",
    "GaussianKL",
    "MatchSimilarity",
    "NegativeKLSimilarity",
    "SoftContrastiveLoss",
    "self_mismatch",
    "to_inner_product",
]


@paper("hib", "multivariate-retrieval")
class GaussianHead(nn.Module):
    """Two linear maps: of a state to a mean and to a log variance.

    Args:
        in_dim: of the states.
        dim: of the Gaussian; the output has twice as many.
        variance: "exp": the map gives the log variance (hib); "softplus": the variance is ``softplus(v)``
            (multivariate-retrieval).
        seed: of the maps' start; variances start at about 1 (exp) or 0.7 (softplus).

    Example:
        >>> import torch
        >>> from polyhead.objectives import GaussianHead
        >>> GaussianHead(6, 2)(torch.randn(3, 6)).shape
        torch.Size([3, 4])
    """

    def __init__(self, in_dim: int, dim: int, *, variance: Literal["exp", "softplus"] = "exp", seed: int = 0) -> None:
        super().__init__()
        if variance not in ("exp", "softplus"):
            raise InputError(f"variance is {variance!r}, expected 'exp' or 'softplus'.")
        self.variance = variance
        self.mean = nn.Linear(in_dim, dim)
        self.spread = nn.Linear(in_dim, dim)
        generator = torch.Generator().manual_seed(seed)
        for linear, scale in ((self.mean, 1.0), (self.spread, 0.1)):
            linear.weight.data.copy_(torch.randn(dim, in_dim, generator=generator) * scale / in_dim**0.5)
            linear.bias.data.zero_()

    def forward(self, states: Tensor, spread_states: Tensor | None = None) -> Tensor:
        """``[..., 2 dim]`` of ``[..., in_dim]``; the variance may have a state of its own (the paper's ``[VAR]``)."""
        spread = self.spread(states if spread_states is None else spread_states)
        if self.variance == "softplus":
            spread = nn.functional.softplus(spread).clamp(min=1e-6).log()
        return torch.cat((self.mean(states), spread), -1)


def _parts(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape[-1] % 2:
        raise InputError(f"A Gaussian is [mean | log variance], an even number of features; got {x.shape[-1]}.")
    mean, spread = x.chunk(2, -1)
    return mean, spread


@paper("hib")
class MatchSimilarity(Similarity):
    """Log odds that two Gaussians match: ``p = mean sigmoid(b - a |z1 - z2|)`` over drawn ``z1``, ``z2`` (eq. 2-4).

    ``a`` (kept above 0) and ``b`` are learned. All ``samples^2`` pairs of draws count; memory is ``samples^2 n m``.

    Args:
        samples: draws a Gaussian.
        seed: None draws anew at every call, from torch's generator; a number draws the same every time.

    Example:
        >>> import torch
        >>> from polyhead.objectives import MatchSimilarity
        >>> sure, unsure = torch.tensor([[0.0, -9.0]]), torch.tensor([[0.0, 2.0]])
        >>> compare = MatchSimilarity(seed=0)
        >>> bool(compare(sure, sure) > compare(unsure, unsure))
        True
    """

    def __init__(self, *, samples: int = 8, seed: int | None = None) -> None:
        super().__init__()
        self.samples = samples
        self.seed = seed
        self.log_scale = nn.Parameter(torch.tensor(0.0))
        self.shift = nn.Parameter(torch.tensor(1.0))

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Similarity`."""
        generator = None if self.seed is None else torch.Generator().manual_seed(self.seed)
        first, second = self._draw(x, generator), self._draw(y, generator)
        distance = torch.cdist(first, second).unflatten(-1, (-1, self.samples)).unflatten(-3, (-1, self.samples))
        odds = self.shift.to(x.dtype) - self.log_scale.to(x.dtype).exp() * distance  # [..., n, samples, m, samples]
        yes = nn.functional.logsigmoid(odds).logsumexp((-3, -1))
        no = nn.functional.logsigmoid(-odds).logsumexp((-3, -1))
        return yes - no

    def _draw(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        mean, spread = (part.unsqueeze(-2) for part in _parts(x))
        shape = (*mean.shape[:-2], self.samples, mean.shape[-1])
        noise = torch.randn(shape, generator=generator, dtype=x.dtype, device=None if generator else x.device)
        return (mean + (spread / 2).exp() * noise.to(x.device)).flatten(-3, -2)


@paper("hib")
class SoftContrastiveLoss(Loss):
    """Cross-entropy of pairs, similarities read as log odds of a match: ``softplus(-s)`` and ``softplus(s)`` (eq. 1).

    One mean over all pairs, positives and negatives alike.
    """

    def terms(self, similarity: Tensor, relation: Relation) -> list[Terms]:
        """See :class:`Loss`."""
        values = torch.cat((nn.functional.softplus(-similarity), nn.functional.softplus(similarity)))
        return [Terms(values, torch.cat((relation.positive, relation.negative)))]


@paper("hib")
class GaussianKL(Regularizer):
    """``beta`` times the mean divergence of Gaussians from the standard normal; without it variances shrink to points.

    Args:
        beta: weight.
    """

    def __init__(self, beta: float = 1e-4) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, embeddings: Tensor) -> Tensor:
        """A scalar of Gaussians ``[n, 2 d]``."""
        mean, spread = _parts(embeddings)
        return self.beta * 0.5 * (mean.square() + spread.exp() - 1 - spread).sum(-1).mean()


@paper("hib")
def self_mismatch(match: MatchSimilarity, gaussians: Tensor) -> Tensor:
    """``1 - p`` that two draws of the same item match, ``[n]``: how unsure an embedding is.

    Args:
        match: with its learned scale and shift.
        gaussians: ``[n, 2 d]``.
    """
    return torch.sigmoid(-match.paired(gaussians, gaussians))


@paper("multivariate-retrieval")
class NegativeKLSimilarity(Similarity):
    """``-KL(x || y)`` of diagonal Gaussians, queries in rows (paper multivariate-retrieval).

    Not symmetric. With equal variances everywhere it is minus a squared distance.
    """

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Similarity`."""
        mean_q, spread_q = _parts(x)
        mean_d, spread_d = _parts(y)
        precision = (-spread_d).exp()
        fit = spread_q.exp() @ precision.transpose(-1, -2) + _weighted_distance(mean_q, mean_d, precision)
        sizes = spread_d.sum(-1).unsqueeze(-2) - spread_q.sum(-1).unsqueeze(-1)
        return -0.5 * (sizes - mean_q.shape[-1] + fit)


def _weighted_distance(x: Tensor, y: Tensor, precision: Tensor) -> Tensor:
    """``sum_k precision_jk (x_ik - y_jk)^2`` as ``[..., n, m]``, by matrix products."""
    crossed = x @ (precision * y).transpose(-1, -2)
    own = (precision * y.square()).sum(-1).unsqueeze(-2)
    return x.square() @ precision.transpose(-1, -2) - 2 * crossed + own


@paper("multivariate-retrieval")
def to_inner_product(gaussians: Tensor, side: Literal["query", "document"]) -> Tensor:
    """Vectors whose dot product ranks documents as ``-KL(query || document)`` does, for any vector index.

    The dot product is ``2 (-KL) + what depends on the query alone``.

    Args:
        gaussians: ``[n, 2 d]``.
        side: which of the two is wanted.

    Returns:
        ``[n, 2 d + 1]``.

    Example:
        >>> import torch
        >>> from polyhead.objectives import NegativeKLSimilarity, to_inner_product
        >>> queries, documents = torch.randn(2, 6), torch.randn(5, 6)
        >>> scores = to_inner_product(queries, "query") @ to_inner_product(documents, "document").T
        >>> torch.equal(scores.argsort(1), NegativeKLSimilarity()(queries, documents).argsort(1))
        True
    """
    mean, spread = _parts(gaussians)
    if side == "query":
        return torch.cat((torch.ones_like(mean[..., :1]), spread.exp() + mean.square(), mean), -1)
    if side != "document":
        raise InputError(f"side is {side!r}, expected 'query' or 'document'.")
    precision = (-spread).exp()
    own = -(spread + mean.square() * precision).sum(-1, keepdim=True)
    return torch.cat((own, -precision, 2 * mean * precision), -1)
