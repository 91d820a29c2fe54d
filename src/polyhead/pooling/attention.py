"""Attention of learned queries to the tokens, one query a head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.pooling.base import Pooler, softmax_over_tokens

__all__ = ["AttentionPooler"]


class AttentionPooler(Pooler):
    """Each head weighs the tokens by a softmax of their product with a learned query, and pools its slice of the state.

    Head ``h`` owns slice ``x_t^h`` of the state and query ``q_h``:
    ``y^h = sum_t softmax_t(q_h . x_t^h / sqrt(d_h)) x_t^h``, the heads side by side. Queries begin at zero, so that an
    untrained pooler is the mean. A head costs as many weights as its slice has numbers.

    Args:
        dim: of the states.
        heads: how many; divides ``dim``.

    Raises:
        InputError: ``heads`` does not divide ``dim``.

    Example:
        >>> import torch
        >>> from polyhead.pooling import AttentionPooler
        >>> pooler = AttentionPooler(4, heads=2)
        >>> pooler(torch.arange(8.0).view(1, 2, 4), torch.ones(1, 2)).tolist()
        [[2.0, 3.0, 4.0, 5.0]]
    """

    knobs = ("dim", "heads")

    def __init__(self, dim: int, heads: int = 1) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise InputError(f"{heads} heads do not divide a state of {dim} numbers; give a divisor of it.")
        self.dim, self.heads = dim, heads
        self.queries = nn.Parameter(torch.zeros(heads, dim // heads))

    def weights(self, states: Tensor, counted: Tensor) -> Tensor:
        """How much each head takes of each token, ``[batch, tokens, heads]``, of states ``[batch, tokens, dim]``."""
        slices = states.unflatten(-1, self.queries.shape)
        scores = (slices * self.queries.to(states.dtype)).sum(-1) * self.queries.shape[-1] ** -0.5
        return softmax_over_tokens(scores, counted)

    def pool(self, states: Tensor, counted: Tensor, positions: Tensor) -> Tensor:
        """See :class:`Pooler`."""
        states = states.masked_fill(~counted.unsqueeze(-1), 0.0)
        weights = self.weights(states, counted)
        return torch.einsum("bth,bthd->bhd", weights, states.unflatten(-1, self.queries.shape)).flatten(1)
