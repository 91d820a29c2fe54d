"""Where keys and values stay: as many tokens for each key-value head as its budget says, and not one row more.

Heads of one budget are stored together, so a layer holds one pair of tensors for each budget that occurs in it. What is
counted is what is held: nothing is padded to the largest head, and no dropped token stays behind under a mask.
Positions stay logical: a token keeps the place it had in the text, whatever was dropped before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from polyhead.cache.base import CachePolicy

__all__ = ["HeadCacheLayer", "HeadGroup", "Look"]


@dataclass
class Look:
    """What a policy sees when it decides which tokens of some heads to keep.

    Attributes:
        layer: index.
        heads: the key-value heads, all of one budget.
        budget: tokens each may keep.
        keys, values: ``[batch, heads, kept tokens, head_dim]``, keys as the model gave them (already rotated).
        positions: ``[batch, heads, kept tokens]`` logical places, rising.
        real: ``[batch, heads, kept tokens]`` False at padding.
        seen: tokens so far.
        queries: ``[batch, heads, queries a head, new tokens, head_dim]`` of the step that has just run.
        scale: factor of the logits.
    """

    layer: int
    heads: Sequence[int]
    budget: int
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    real: torch.Tensor
    seen: int
    queries: torch.Tensor
    scale: float


@dataclass
class HeadGroup:
    """Key-value heads of one budget.

    Attributes:
        heads: their numbers.
        budget: tokens each may keep; None for all.
        keys, values: ``[batch, heads, kept tokens, head_dim]``.
        positions: ``[batch, heads, kept tokens]``.
        dropped: float32 sums of dropped keys and values ``[batch, heads, head_dim]`` and counts ``[batch, heads]``,
            where the policy compensates for them.
    """

    heads: list[int]
    budget: int | None
    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    dropped: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Everything that is held."""
        return [self.keys, self.values, self.positions, *(self.dropped or ())]

    def select(self, index: torch.Tensor) -> None:
        """Keep rows ``index`` of the batch (beam search)."""
        self.keys, self.values, self.positions = (each[index] for each in (self.keys, self.values, self.positions))
        if self.dropped is not None:
            keys, values, counts = self.dropped
            self.dropped = (keys[index], values[index], counts[index])

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        """Add new tokens of these heads."""
        self.keys = torch.cat([self.keys, keys[:, self.heads]], 2)
        self.values = torch.cat([self.values, values[:, self.heads]], 2)
        self.positions = torch.cat([self.positions, positions.expand(len(keys), len(self.heads), -1)], 2)


class HeadCacheLayer(CacheLayerMixin):
    """One layer's keys and values with a budget for each key-value head.

    Args:
        policy: decides which tokens stay.
        layer: index.
        budgets: ``[kv_heads]`` tokens each head may keep; None for all.
    """

    is_sliding = False

    def __init__(self, policy: CachePolicy, layer: int, budgets: Sequence[int | None]) -> None:
        super().__init__()
        self.policy = policy
        self.layer = layer
        self.budgets = list(budgets)
        self.seen = 0
        self.groups: list[HeadGroup] = []
        self.real: torch.Tensor | None = None
        self._settled = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make empty groups, one a budget."""
        self.dtype, self.device = key_states.dtype, key_states.device
        none = key_states[:, :0, :0]
        by_budget: dict[int | None, list[int]] = {}
        for head, budget in enumerate(self.budgets):
            by_budget.setdefault(budget, []).append(head)
        for budget, heads in by_budget.items():
            keys, values = (each[:, heads, :0] for each in (key_states, value_states))
            positions = torch.zeros(len(none), len(heads), 0, dtype=torch.int32, device=self.device)
            self.groups.append(HeadGroup(heads, budget, keys, values, positions))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new keys and values; what is returned knows this layer, so that attention finds what is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        here = torch.arange(self.seen, self.seen + new, dtype=torch.int32, device=self.device)
        for group in self.groups:
            group.append(key_states, value_states, here)
        self.seen += new
        first = self.groups[0]
        keys, values = (first.keys, first.values) if self.is_whole else (key_states, value_states)
        keys = keys.view_as(keys)
        keys._polyhead_layer = self  # type: ignore[attr-defined]
        return keys, values

    @property
    def is_whole(self) -> bool:
        """Whether every head still holds every token, in one tensor."""
        return len(self.groups) == 1 and self.groups[0].keys.shape[2] == self.seen and not self.groups[0].dropped

    def attend(self, queries: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
        """Head outputs ``[batch, heads, new tokens, head_dim]`` of queries of that shape.

        Queries that share a key-value head are one matrix product with it: nothing is repeated.
        """
        new = queries.shape[2]
        grouped = queries.unflatten(1, (len(self.budgets), -1))
        width = self.groups[0].values.shape[-1]
        found = torch.empty((*grouped.shape[:-1], width), dtype=self.dtype, device=self.device)
        for group in self.groups:
            own = grouped[:, group.heads]
            keys, values, bias = self._with_dropped(group, self._bias(group, mask, new))
            if bias is not None:
                bias = bias.repeat(1, 1, own.shape[2], 1)
            mixed = F.scaled_dot_product_attention(own.flatten(2, 3), keys, values, attn_mask=bias, scale=scale)
            found[:, group.heads] = mixed.unflatten(2, (own.shape[2], new))
        return found.flatten(1, 2)

    def settle(self, queries: torch.Tensor, mask: torch.Tensor | None, scale: float) -> None:
        """Drop what is over budget, after a step of attention."""
        if mask is not None:
            self.real = mask[:, 0, -1, : self.seen]
        elif self.real is not None and self.real.shape[1] < self.seen:
            self.real = F.pad(self.real, (0, self.seen - self.real.shape[1]), value=True)
        if self.policy.once and self._settled:
            return
        grouped = queries.unflatten(1, (len(self.budgets), -1))
        for group in self.groups:
            if group.budget is not None and group.keys.shape[2] > group.budget:
                self._drop(group, grouped[:, group.heads], scale)
        self._settled = True

    def _drop(self, group: HeadGroup, queries: torch.Tensor, scale: float) -> None:
        assert group.budget is not None
        real = torch.ones_like(group.positions, dtype=torch.bool)
        if self.real is not None:
            real = self.real[:, None].expand(-1, len(group.heads), -1).gather(2, group.positions.long())
        held = (group.keys, group.values, group.positions)
        look = Look(self.layer, group.heads, group.budget, *held, real, self.seen, queries, scale)
        worth = self.policy.priority(look).masked_fill(~real, -math.inf)
        kept = worth.topk(group.budget, dim=2).indices.sort(2).values
        if self.policy.compensates:
            _compensate(group, real.scatter(2, kept, value=False).float())
        group.keys = group.keys.gather(2, kept[..., None].expand(-1, -1, -1, group.keys.shape[-1]))
        group.values = group.values.gather(2, kept[..., None].expand(-1, -1, -1, group.values.shape[-1]))
        group.positions = group.positions.gather(2, kept)

    def _bias(self, group: HeadGroup, mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
        """What is added to logits, ``[batch, heads, new tokens, kept tokens]``; None where nothing is."""
        if mask is not None:
            shape = (-1, len(group.heads), -1, -1)
            places = group.positions[:, :, None].expand(-1, -1, new, -1).long()
            allowed = mask[:, :1].expand(len(group.keys), *shape[1:]).gather(3, places)
        elif new > 1:
            here = torch.arange(self.seen - new, self.seen, device=self.device)
            allowed = group.positions[:, :, None] <= here[:, None]
        else:
            return None
        return torch.zeros(allowed.shape, dtype=self.dtype, device=self.device).masked_fill_(~allowed, -math.inf)

    def _with_dropped(
        self, group: HeadGroup, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values with the token that stands for the dropped ones in front, weighing as many as they were."""
        if group.dropped is None:
            return group.keys, group.values, bias
        keys, values, counts = group.dropped
        some = counts.clamp_min(1)[..., None]
        keys = torch.cat([(keys / some)[:, :, None].to(self.dtype), group.keys], 2)
        values = torch.cat([(values / some)[:, :, None].to(self.dtype), group.values], 2)
        if bias is None:
            batch, heads, held = group.positions.shape
            bias = torch.zeros((batch, heads, 1, held), dtype=self.dtype, device=self.device)
        weight = counts.log()[:, :, None, None].to(bias.dtype).expand(-1, -1, bias.shape[2], 1)
        return keys, values, torch.cat([weight, bias], 3)

    @property
    def bytes(self) -> int:
        """Bytes really held, the sums over dropped tokens and the places included."""
        return sum(each.untyped_storage().nbytes() for group in self.groups for each in group.tensors())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks are made over logical places, from 0."""
        return self.seen + int(query_length), 0

    def get_seq_length(self) -> int:
        """Tokens seen, dropped ones included."""
        return self.seen

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.groups, self.real, self.seen = [], None, 0
        self.is_initialized = self._settled = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Follow beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each text."""
        rows = len(self.groups[0].keys) if self.groups else 0
        self.batch_select_indices(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some texts."""
        for group in self.groups:
            group.select(indices.to(self.device))
        if self.real is not None:
            self.real = self.real[indices.to(self.device)]


def _compensate(group: HeadGroup, gone: torch.Tensor) -> None:
    """Add the tokens that go, ``gone [batch, heads, kept tokens]``, to the sums that stand for them."""
    keys, values = ((each * gone[..., None]).sum(2) for each in (group.keys, group.values))
    if group.dropped is not None:
        before = group.dropped
        group.dropped = (before[0] + keys, before[1] + values, before[2] + gone.sum(2))
    else:
        group.dropped = (keys, values, gone.sum(2))
