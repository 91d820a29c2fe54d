"""Landmark attention: a token at the end of each block learns to open it, so that blocks can be fetched by it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional as F

from polyhead.attention._gather import take, to_front
from polyhead.attention.base import Attention, Positions, repeat_groups
from polyhead.attention.call import AttentionShape, Call
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["LandmarkAttention", "insert_landmarks", "without_landmarks"]


def insert_landmarks(tokens: torch.Tensor, landmark: int | torch.Tensor, every: int = 50) -> torch.Tensor:
    """Put a landmark after every ``every`` tokens; a last block that is not full gets none.

    Args:
        tokens: ``[batch, tokens]`` ids without padding, or ``[batch, tokens, features]`` states.
        landmark: its id, or its ``[features]``.
        every: tokens of a block.

    Returns:
        ``tokens // every`` more than came in.

    Example:
        >>> insert_landmarks(torch.tensor([[1, 2, 3, 4, 5]]), 99, every=2).tolist()
        [[1, 2, 99, 3, 4, 99, 5]]
    """
    _check_every(every)
    held = tokens.shape[1]
    places = torch.arange(held + held // every, device=tokens.device)
    block, inside = places // (every + 1), places % (every + 1)
    moved = tokens[:, (block * every + inside).clamp_max(held - 1)]
    marked = (inside == every).view(1, -1, *[1] * (tokens.dim() - 2))
    return torch.where(marked, torch.as_tensor(landmark, dtype=tokens.dtype, device=tokens.device), moved)


def without_landmarks(states: torch.Tensor, every: int = 50) -> torch.Tensor:
    """``[batch, tokens, ...]`` without the places of landmarks: undoes :func:`insert_landmarks`."""
    _check_every(every)
    places = torch.arange(states.shape[1], device=states.device)
    return states[:, places % (every + 1) != every]


@paper("landmark-attention")
class LandmarkAttention(Attention):
    """A token reaches another block through its landmark: weight inside the block times the landmark's own weight.

    Every ``every + 1``-th real token is the landmark of the ``every`` before it. The tokens of a query's own block
    and the landmarks of earlier blocks share one softmax; the tokens of each earlier block have one among themselves.
    What a landmark takes of the first is spread over its block by the second; landmarks have no value of
    their own, and a query's own landmark is not seen.

    Args:
        shape: widths; None to serve a stock model's steps.
        causal: True; blocks are opened backwards only.
        positions: tells queries and keys where they stand, landmarks counted.
        every: tokens of a block.
        top: earlier blocks a query opens, those of the greatest landmark logits; None for all, as in training.
            Steps of at most a block fetch these blocks and nothing else.
        per_head: whether heads choose blocks each for itself, or all by the greatest logit over heads.

    Raises:
        InputError: counts below 1, or ``causal=False``.

    Source:
        landmark-attention (Mohtashami and Jaggi 2023, section 3).

    Example:
        >>> layer = LandmarkAttention(AttentionShape(64, 4), causal=True, every=4)
        >>> tokens = insert_landmarks(torch.randn(1, 10, 64), torch.zeros(64), every=4)
        >>> without_landmarks(layer(tokens), every=4).shape
        torch.Size([1, 10, 64])
    """

    name: ClassVar[str] = "landmark-attention"
    summary: ClassVar[str] = "Landmarks open blocks of the past, all or the best few"
    both_directions: ClassVar[bool] = False

    def __init__(
        self,
        shape: AttentionShape | None,
        *,
        causal: bool = True,
        positions: Positions | None = None,
        every: int = 50,
        top: int | None = None,
        per_head: bool = True,
    ) -> None:
        _check_every(every)
        if top is not None and top < 1:
            raise InputError(f"top={top} blocks were asked for; expected at least 1, or None for all.")
        super().__init__(shape, causal=causal, positions=positions)
        self.every = every
        self.top = top
        self.per_head = per_head

    def rank(self, q: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """How much queries want blocks: the landmark's logit, ``[batch, heads, query tokens, blocks]``.

        Args:
            q: ``[batch, heads, query tokens, head_dim]``, scaled.
            blocks: keys ``[batch, heads, blocks, every + 1, head_dim]``, the landmark last.
        """
        return q @ blocks[:, :, :, -1].transpose(2, 3)

    def weights(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Weights ``[batch, heads, query tokens, key tokens]``, zero at landmarks."""
        q, k = self.inner(q, k, call)
        k, order = repeat_groups(k, q.shape[1]), None
        if call.padding is not None:
            order = to_front(call.padding)[:, None].expand(-1, q.shape[1], -1)
            k = take(k, order)
        size, tokens = self.every + 1, k.shape[2]
        blocks = F.pad(k, (0, 0, 0, -tokens % size)).unflatten(2, (-1, size))
        logits = torch.einsum("bhid,bhcsd->bhics", q, blocks)
        places = torch.arange(size, device=q.device)
        own, asked = call.q_positions // size, call.q_positions % size
        at = torch.arange(blocks.shape[2], device=q.device) - own[..., None]
        far = (at < 0)[:, None] & self._opened(q, blocks, at)
        near = (at == 0)[:, None, :, :, None] & (places <= asked[..., None])[:, None, :, None, :]
        seen = torch.cat([near[..., :-1].expand_as(logits[..., :-1]), far[..., None].expand_as(logits[..., -1:])], -1)
        joint = logits.masked_fill(~seen, -torch.inf).flatten(3).softmax(-1).view_as(logits)
        inside = logits[..., :-1].softmax(-1)
        found = F.pad(joint[..., :-1] + inside * joint[..., -1:], (0, 1)).flatten(3)[..., :tokens]
        return found if order is None else found.gather(3, order.argsort(2)[:, :, None].expand_as(found))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads ``[batch, heads, query tokens, head_dim]``; the few queries of a step fetch their blocks."""
        few = q.shape[2] <= self.every < k.shape[2] and q.shape[2] < k.shape[2]
        if self.top is None or not few or call.padding is not None or call.mask is not None:
            return self.mix(self.weights(q, k, call), v, call)
        q, k = self.inner(q, k, call)
        k, v, size = repeat_groups(k, q.shape[1]), repeat_groups(v, q.shape[1]), self.every + 1
        full = k.shape[2] // size
        blocks = k[:, :, : full * size].unflatten(2, (full, size))
        own, asked = call.q_positions // size, call.q_positions % size
        scores = self._shared(self.rank(q, blocks)).masked_fill(
            torch.arange(full, device=q.device) >= own[..., None][:, None], -torch.inf
        )
        best = scores.topk(min(self.top, full), -1)
        places = torch.arange(size, device=q.device)
        fetched = best.indices[..., None] * size + places
        logits = torch.einsum("bhid,bhitsd->bhits", q, take(k, fetched))
        gates = logits[..., -1].masked_fill(best.values == -torch.inf, -torch.inf)
        mine = (own[..., None] * size + places[:-1]).clamp_max(k.shape[2] - 1)[:, None].expand(*q.shape[:2], -1, -1)
        near = torch.einsum("bhid,bhisd->bhis", q, take(k, mine))
        near = near.masked_fill((places[:-1] > asked[..., None])[:, None], -torch.inf)
        joint = torch.cat([near, gates], -1).softmax(-1)
        spread = logits[..., :-1].softmax(-1) * joint[..., self.every :, None]
        far = torch.einsum("bhits,bhitsd->bhid", spread, take(v, fetched[..., :-1]))
        return far + torch.einsum("bhis,bhisd->bhid", joint[..., : self.every], take(v, mine))

    def _shared(self, scores: torch.Tensor) -> torch.Tensor:
        return scores if self.per_head else scores.amax(1, keepdim=True).expand_as(scores)

    def _opened(self, q: torch.Tensor, blocks: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """``[batch, heads, query tokens, blocks]`` which earlier blocks are opened."""
        if self.top is None or self.top >= blocks.shape[2]:
            return torch.ones((), dtype=torch.bool, device=q.device)
        scores = self._shared(self.rank(q, blocks)).masked_fill((at >= 0)[:, None], -torch.inf)
        best = scores.topk(self.top, -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(3, best, True)


def _check_every(every: int) -> None:
    if every < 1:
        raise InputError(f"A landmark after every {every} tokens was asked for; expected at least 1.")
