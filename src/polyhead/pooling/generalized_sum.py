"""Generalised sum pooling: part of the tokens' mass is carried to learned prototypes, the rest is left behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyhead.errors import InputError
from polyhead.papers.marks import paper
from polyhead.pooling.base import Pooler

__all__ = ["GeneralizedSumPooler", "ZeroShotPrototypeLoss"]

_BISECTIONS = 60


@paper("gsp-pooling")
class GeneralizedSumPooler(Pooler):
    """Tokens carry mass ``1/n``; entropic partial transport moves ``mass`` of it to the nearest prototypes.

    With costs ``C_ij = |w_i - x_j|^2`` between prototypes and tokens of length 1 and ``k_j = sum_i exp(-gamma C_ij)``,
    what is left of token ``j`` is ``(1/n) / (1 + t k_j)``, and ``t`` is such that ``mass`` is moved (arXiv 2308.09228).
    So a token gives the share ``s_j = sigmoid(log t + log k_j)`` of its mass, and the pooled vector is
    ``sum_j (s_j / (n mass)) x_j``. ``t`` is found by bisection, which cannot miss the only root, and its gradient is
    the closed form ``d log t / d log k_j = -s_j (1 - s_j) / sum s (1 - s)``: nothing is unrolled.

    Args:
        dim: of the states.
        count: how many prototypes.
        mass: share of the whole that is pooled; 1 is the mean.
        gamma: sharpness; the larger, the more a token goes or stays as a whole.

    Raises:
        InputError: a mass that is not above 0 and at most 1.

    Example:
        >>> import torch
        >>> from polyhead.pooling import GeneralizedSumPooler
        >>> pooler = GeneralizedSumPooler(2, count=1, mass=0.5, gamma=20.0)
        >>> pooler.prototypes.data = torch.tensor([[1.0, 0.0]])
        >>> pooler(torch.tensor([[[2.0, 0.0], [0.0, 2.0]]]), torch.ones(1, 2)).tolist()   # the nearer half
        [[2.0, 0.0]]
    """

    knobs = ("dim", "count", "mass", "gamma")

    def __init__(self, dim: int, count: int = 32, mass: float = 0.3, gamma: float = 20.0) -> None:
        super().__init__()
        if not 0 < mass <= 1:
            raise InputError(f"mass = {mass}, expected a share above 0 and at most 1 (the mean).")
        self.dim, self.count, self.mass, self.gamma = dim, count, mass, gamma
        self.prototypes = nn.Parameter(torch.randn(count, dim))

    def shares(self, states: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens give and what prototypes get.

        Args:
            states: ``[batch, tokens, dim]``.
            counted: ``[batch, tokens]`` bool.

        Returns:
            Weights of the tokens ``[batch, tokens]`` and of the prototypes ``[batch, prototypes]``; each sum to 1.
        """
        states = states.masked_fill(~counted.unsqueeze(-1), 0.0)
        tokens = functional.normalize(states, dim=-1)
        prototypes = functional.normalize(self.prototypes.to(states.dtype), dim=-1)
        near = -self.gamma * (2 - 2 * tokens @ prototypes.T)
        if self.mass < 1:
            total = near.logsumexp(-1)
            level: Any = _Level.apply(total, counted, self.mass)
            given = (total + level.unsqueeze(1)).sigmoid()
        else:
            given = torch.ones_like(near[..., 0])
        count = counted.sum(1, keepdim=True).clamp(min=1).to(states.dtype)
        weights = given.masked_fill(~counted, 0.0) / (count * self.mass)
        return weights, torch.einsum("bt,btp->bp", weights, near.softmax(-1))

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`."""
        weights, _ = self.shares(states, counted)
        return torch.einsum("bt,btd->bd", weights, states.masked_fill(~counted.unsqueeze(-1), 0.0))


class _Level(torch.autograd.Function):
    """The level ``s`` of a text at which the mean of ``sigmoid(a_j + s)`` over its tokens is the mass."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, counted: Tensor, mass: float) -> Tensor:
        """``[batch]`` of ``a [batch, tokens]``."""
        # One token at the mass's logit alone gives the level; the root lies between those of the extreme tokens.
        logit = torch.tensor(mass, dtype=torch.float64).logit().item()
        big = torch.finfo(a.dtype).max
        high = logit - a.masked_fill(~counted, big).amin(1)
        low = logit - a.masked_fill(~counted, -big).amax(1)
        count = counted.sum(1).clamp(min=1).to(a.dtype)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            moved = (a + middle.unsqueeze(1)).sigmoid().masked_fill(~counted, 0.0).sum(1) / count
            low, high = torch.where(moved < mass, middle, low), torch.where(moved < mass, high, middle)
        level = torch.where(counted.any(1), (low + high) / 2, torch.zeros_like(low))
        ctx.save_for_backward(a, counted, level)
        return level

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The implicit derivative of the level."""
        a, counted, level = ctx.saved_tensors
        share = (a + level.unsqueeze(1)).sigmoid().masked_fill(~counted, 0.0)
        slope = share * (1 - share)
        return -grad.unsqueeze(1) * slope / slope.sum(1, keepdim=True).clamp(min=1e-30), None, None


@paper("gsp-pooling")
class ZeroShotPrototypeLoss(nn.Module):
    """Asks that prototypes carry over to other classes: half of a batch's classes predict those of the other half.

    A ridge regression from the prototypes' shares to learned class vectors is fitted on one half and applied to the
    other, whose classes must be recognised among all (softmax cross-entropy); both ways round. Added to a metric loss
    with a small weight, such as 0.1 (arXiv 2308.09228, section 4.2).

    Args:
        classes: how many there are.
        dim: of the class vectors.
        ridge: of the regression.
        scale: of the scores before the softmax.
    """

    def __init__(self, classes: int, dim: int = 64, ridge: float = 0.05, scale: float = 9.5) -> None:
        super().__init__()
        self.ridge, self.scale = ridge, scale
        self.classes = nn.Parameter(torch.randn(classes, dim) * dim**-0.5)

    def forward(self, shares: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            shares: of prototypes ``[batch, prototypes]``, from :meth:`GeneralizedSumPooler.shares`.
            labels: ``[batch]`` integers below ``classes``.

        Raises:
            InputError: a batch of a single class.
        """
        present = labels.unique()
        if len(present) < 2:
            raise InputError(
                "The batch has one class; half of its classes are to predict the others: give two or more."
            )
        first = torch.isin(labels, present[: len(present) // 2])
        both = [self._transfer(shares, labels, known) for known in (first, ~first)]
        return torch.cat(both).mean()

    def _transfer(self, shares: Tensor, labels: Tensor, known: Tensor) -> Tensor:
        """Losses of the samples that are not known, their class vectors predicted from those that are."""
        seen, vectors = shares[known], self.classes[labels[known]]
        gram = seen @ seen.T + self.ridge * torch.eye(len(seen), dtype=seen.dtype, device=seen.device)
        mapping = seen.T @ torch.linalg.solve(gram, vectors)
        logits = self.scale * shares[~known] @ mapping @ self.classes.T
        return functional.cross_entropy(logits, labels[~known], reduction="none")
