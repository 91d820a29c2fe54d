"""Distances in the Poincare ball, the head that maps into it, and whether data suit it (paper hyp-vit)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.objectives.similarity import Similarity, squared_distance
from polyhead.papers import paper

__all__ = ["HyperbolicSimilarity", "PoincareHead", "gromov_delta"]


@paper("hyp-vit")
class HyperbolicSimilarity(Similarity):
    """Minus the geodesic distance in the Poincare ball: ``(2 / sqrt c) artanh(sqrt c |(-x) + y|)``, ``+`` Mobius.

    Computed as ``arcosh(1 + 2 c |x - y|^2 / ((1 - c |x|^2)(1 - c |y|^2))) / sqrt c``, which is the same number without
    the Mobius sum. Points on or outside the ball of radius ``1 / sqrt c`` are drawn just inside. For ``c -> 0`` it
    becomes minus twice the Euclidean distance. With ``InfoNCE(temperature=0.2)`` it is the paper's loss.

    Args:
        c: curvature, above 0.

    Example:
        >>> import torch
        >>> from polyhead.objectives import HyperbolicSimilarity
        >>> compare = HyperbolicSimilarity(c=1.0)
        >>> round(compare(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 0.0]])).item(), 4)
        -1.0986
    """

    def __init__(self, c: float = 0.1) -> None:
        super().__init__()
        if c <= 0:
            raise InputError(f"The curvature c is {c}, expected above 0; without curvature use EuclideanSimilarity.")
        self.c = c

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """See :class:`Similarity`."""
        x, y = _inside(x, self.c), _inside(y, self.c)
        left, right = (1 - self.c * part.square().sum(-1) for part in (x, y))
        above = self.c * squared_distance(x, y) / (left.unsqueeze(-1) * right.unsqueeze(-2))
        # arcosh(1 + 2 a) = 2 arsinh(sqrt a); the floor keeps its slope finite where two points are one.
        return -2 / self.c**0.5 * torch.asinh(above.clamp(min=torch.finfo(above.dtype).eps ** 2).sqrt())


def _inside(x: Tensor, c: float) -> Tensor:
    size = x.norm(dim=-1, keepdim=True)
    limit = (1 - 1e-5) / c**0.5
    return x * (limit / size.clamp(min=limit))


@paper("hyp-vit")
class PoincareHead(nn.Module):
    """Linear map, norm clipped to ``clip``, then the exponential map at 0 into the Poincare ball.

    ``exp_0(v) = tanh(sqrt c |v|) v / (sqrt c |v|)``.

    Args:
        in_dim: of the vectors given.
        dim: of the ball.
        c: curvature.
        clip: longest tangent vector.
        seed: of the map's start.

    Example:
        >>> import torch
        >>> from polyhead.objectives import HyperbolicSimilarity, InfoNCE, Objective, PoincareHead
        >>> head, objective = PoincareHead(6, 2), Objective(InfoNCE(temperature=0.2), HyperbolicSimilarity(0.1))
        >>> objective(head(torch.randn(4, 6)), torch.tensor([0, 0, 1, 1])).ndim
        0
    """

    def __init__(self, in_dim: int, dim: int = 128, *, c: float = 0.1, clip: float = 2.3, seed: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(in_dim, dim)
        start = torch.randn(dim, in_dim, generator=torch.Generator().manual_seed(seed)) / in_dim**0.5
        self.linear.weight.data.copy_(start)
        self.linear.bias.data.zero_()
        self.c = c
        self.clip = clip

    def forward(self, x: Tensor) -> Tensor:
        """``[..., dim]`` points of the ball, of ``[..., in_dim]``."""
        v = self.linear(x)
        size = v.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        v = v * (self.clip / size.clamp(min=self.clip))
        scaled = self.c**0.5 * size.clamp(max=self.clip)
        return torch.tanh(scaled) * v / scaled


@paper("hyp-vit")
def gromov_delta(distances: Tensor) -> float:
    """Gromov's delta relative to the diameter, 0 for a tree to about 1: low, and hyperbolic space suits the data.

    ``2 delta / diameter`` with ``delta = max_ij (max_k min(A_ik, A_kj) - A_ij)`` and ``A`` the Gromov products from
    the first point, as the paper estimates it.

    Args:
        distances: ``[n, n]`` symmetric, 0 on the diagonal; a sample of up to some hundred points, for time is cubic.

    Example:
        >>> import torch
        >>> from polyhead.objectives import gromov_delta
        >>> line = torch.arange(5.0)
        >>> gromov_delta((line[:, None] - line[None]).abs())
        0.0
    """
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1] or len(distances) < 2:
        raise InputError(f"Distances are square, at least [2, 2]; got {list(distances.shape)}.")
    from_first = distances[0]
    products = 0.5 * (from_first[:, None] + from_first[None] - distances)
    best = torch.stack([torch.minimum(row[:, None], products).amax(0) for row in products])
    return float(2 * (best - products).amax() / distances.amax())
