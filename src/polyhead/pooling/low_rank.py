"""Low-rank multi-head attention pooling: all heads share two factors of their scoring matrices (LAMA)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyhead.errors import InputError
from polyhead.papers.marks import paper
from polyhead.pooling.base import Pooler, softmax_over_tokens

__all__ = ["LowRankPooler", "redundancy"]

_CONTEXTS = ("mean", "cls", "last")


@paper("lama-pooling")
class LowRankPooler(Pooler):
    """``heads`` weightings of the tokens, each by a low-rank bilinear score with the text's own context vector.

    Head ``k`` scores token ``t`` with ``c^T W_k h_t``, where ``W_k = sum_r p_kr q_kr^T`` has rank ``rank`` and its
    factors are columns of two matrices that all heads share: ``f(h_t) = (P^T c) * (Q^T h_t)``, summed over the columns
    of a head (arXiv 1912.00835, section 3). Scores pass tanh and a token's scores are brought to length 1 over the
    heads (our reading of where) before the softmax over tokens. The text's matrix ``M = A H`` has a row a head. Full
    bilinear heads need ``heads * dim^2`` weights, these ``2 * heads * rank * dim``. The paper reads a recurrent
    network's states.

    Args:
        dim: of the states.
        heads: how many.
        rank: of each head's matrix.
        context: the vector ``c``, a pooling of the same states: "mean", "cls" or "last".
        squash: whether scores pass tanh and the normalisation; without it they are the bilinear form itself.

    Raises:
        InputError: an unknown context, or fewer than one head or column.

    Example:
        >>> import torch
        >>> from polyhead.pooling import LowRankPooler
        >>> pooler = LowRankPooler(16, heads=4)
        >>> pooler(torch.randn(2, 5, 16), torch.ones(2, 5)).shape, sum(each.numel() for each in pooler.parameters())
        (torch.Size([2, 4, 16]), 128)
    """

    knobs = ("dim", "heads", "rank", "context", "squash")

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        rank: int = 1,
        context: Literal["mean", "cls", "last"] = "mean",
        *,
        squash: bool = True,
    ) -> None:
        from polyhead.pooling import pooler_for

        super().__init__()
        if context not in _CONTEXTS:
            raise InputError(f"context = {context!r}, expected one of {', '.join(_CONTEXTS)}.")
        if heads < 1 or rank < 1:
            raise InputError(f"{heads} heads of rank {rank} were asked for, expected at least 1 of each.")
        self.dim, self.heads, self.rank, self.context, self.squash = dim, heads, rank, context, squash
        self.summary = pooler_for(context)
        self.left, self.right = (nn.Parameter(torch.randn(dim, heads * rank) * dim**-0.5) for _ in range(2))

    def output_dim(self, dim: int) -> int:
        """See :class:`Pooler`."""
        return self.heads * dim

    def weights(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """What each head takes of each token, ``A [batch, heads, tokens]``.

        Args:
            states: ``[batch, tokens, dim]``.
            counted: ``[batch, tokens]`` bool.
            positions: ``[batch, tokens]``, see :meth:`Pooler.pool`.
        """
        states = states.masked_fill(~counted.unsqueeze(-1), 0.0)
        context = self.summary.pool(states, counted, positions)
        columns = (context @ self.left.to(states.dtype)).unsqueeze(1) * (states @ self.right.to(states.dtype))
        scores = columns.unflatten(-1, (self.heads, self.rank)).sum(-1)
        if self.squash:
            scores = functional.normalize(scores.tanh(), dim=-1)
        return softmax_over_tokens(scores, counted).transpose(1, 2)

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`; ``[batch, heads, dim]``."""
        return self.weights(states, counted, positions) @ states.masked_fill(~counted.unsqueeze(-1), 0.0)


@paper("lama-pooling")
def redundancy(weights: Tensor) -> Tensor:
    """How much heads look at the same tokens: ``|A A^T - I|`` (Frobenius), mean over texts, to be added to a loss.

    Args:
        weights: ``[batch, heads, tokens]``.
    """
    same = torch.eye(weights.shape[1], dtype=weights.dtype, device=weights.device)
    return torch.linalg.matrix_norm(weights @ weights.transpose(1, 2) - same).mean()
