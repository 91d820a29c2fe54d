"""LongHeads: each head reads a few chunks of a long text, at positions no further apart than it was trained on."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch.nn import functional as F

from polyhead.attention._gather import take, to_front
from polyhead.attention.base import Attention, repeat_groups
from polyhead.attention.call import AttentionShape, Call
from polyhead.errors import InputError
from polyhead.papers import paper
from polyhead.positions import RotaryPositions
from polyhead.positions.rotary import rotate

__all__ = ["LongHeadsAttention"]


@paper("longheads")
class LongHeadsAttention(Attention):
    """Past ``budget`` tokens, a query sees the first chunk, the latest two, and those whose chunk key it likes best.

    The key of a chunk: its tokens attend among themselves, the mean of what comes out attends over the chunk's keys.
    Chosen chunks close ranks: they take positions 0, 1, 2, ... in their order, so no distance exceeds the budget. No
    weight is learned or changed; up to ``budget`` tokens it is plain attention.

    Args:
        shape: widths.
        causal: True; chunks are chosen backwards.
        positions: rotary ones, turned after the choice; None for none.
        chunk: tokens of a chunk.
        budget: tokens seen at most, of which ``budget / chunk`` chunks; at least 3.
        per_head: whether heads choose each for themselves, or all by the sum of their scores.

    Raises:
        InputError: a budget of other than 3 or more whole chunks, or positions other than rotary.

    Source:
        longheads (Lu et al. 2024, section 2).

    Example:
        >>> layer = LongHeadsAttention(AttentionShape(64, 4), positions=RotaryPositions(16), chunk=4, budget=16)
        >>> layer.chosen(torch.randn(1, 40, 64))[0, 0, 39].sum().item()
        4
    """

    name: ClassVar[str] = "longheads"
    summary: ClassVar[str] = "Heads choose chunks of a long text and read them at near positions"
    both_directions: ClassVar[bool] = False

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = True,
        positions: RotaryPositions | None = None,
        chunk: int = 64,
        budget: int = 1024,
        per_head: bool = True,
    ) -> None:
        if chunk < 1 or budget % chunk or budget < 3 * chunk:
            raise InputError(
                f"chunk={chunk} and budget={budget} were given; expected a budget of 3 or more whole chunks."
            )
        if positions is not None and not isinstance(positions, RotaryPositions):
            raise InputError(f"Positions {type(positions).__name__} were given; expected RotaryPositions or None.")
        super().__init__(shape, causal=causal, positions=positions)
        self.chunk = chunk
        self.budget = budget
        self.per_head = per_head

    def position(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as they are: they turn once chunks are chosen."""
        return q, k

    def chosen(self, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """``[batch, heads, tokens, chunks]`` which chunks each head reads for each token; padding says nothing."""
        q, k, v, call = self._prepared(hidden, padding)
        order = None if padding is None else to_front(padding)[:, None]
        q, k, v = self._in_front(order, q, repeat_groups(k, q.shape[1]), repeat_groups(v, q.shape[1]))
        kept = self._kept(q, self._chunk_keys(q, k, v, call), -(-k.shape[2] // self.chunk), self._places(q, call))
        return kept if order is None else take(kept, order.argsort(2).expand(-1, q.shape[1], -1))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads ``[batch, heads, query tokens, head_dim]``; a step gathers the chosen chunks only."""
        order = None if call.padding is None else to_front(call.padding)[:, None]
        q, k, v = self._in_front(order, q, repeat_groups(k, q.shape[1]), repeat_groups(v, q.shape[1]))
        keys, places = self._chunk_keys(q, k, v, call), self._places(q, call)
        kept = self._kept(q, keys, -(-k.shape[2] // self.chunk), places)
        if call.before is not None and q.shape[2] <= self.chunk:
            heads = self._gathered(q, k, v, kept, places, call)
        elif self.positions is None:
            met = kept.repeat_interleave(self.chunk, 3)[..., : k.shape[2]]
            met = met & (torch.arange(k.shape[2], device=q.device) <= places[:, None])
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=met, scale=self.scale(q, call))
        else:
            heads = self._weights(q, k, kept, places, call) @ v
        return heads if order is None else take(heads, order.argsort(2).expand(-1, q.shape[1], -1))

    def weights(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Weights ``[batch, heads, tokens, tokens]``, zero outside of chosen chunks."""
        order = None if call.padding is None else to_front(call.padding)[:, None]
        v = repeat_groups(self.split(self.v_proj(call.hidden)), q.shape[1])
        q, k, v = self._in_front(order, q, repeat_groups(k, q.shape[1]), v)
        places = self._places(q, call)
        kept = self._kept(q, self._chunk_keys(q, k, v, call), -(-k.shape[2] // self.chunk), places)
        found = self._weights(q, k, kept, places, call)
        if order is None:
            return found
        back = order.argsort(2).expand(-1, q.shape[1], -1)
        return take(take(found, back).transpose(2, 3), back).transpose(2, 3)

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes of keys and values, of chunk keys, and of the queries of the chunk that is being written."""
        assert self.shape is not None
        more = tokens // self.chunk + tokens % self.chunk
        return super().cache_bytes(tokens, itemsize) + self.shape.width * more * itemsize

    def _in_front(self, order: torch.Tensor | None, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return states if order is None else tuple(take(each, order.expand(-1, each.shape[1], -1)) for each in states)

    def _places(self, q: torch.Tensor, call: Call) -> torch.Tensor:
        """``[query tokens]`` places, real tokens in front."""
        if call.before is None:
            return torch.arange(q.shape[2], device=q.device)
        return call.q_positions[0]

    def _turned(self, states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """States ``[batch, heads, tokens, head_dim]`` at places that broadcast to ``[batch, heads, tokens]``."""
        if not isinstance(self.positions, RotaryPositions):
            return states
        return rotate(states, places[..., None].double() * self.positions.frequencies(states.device))

    def _at_each(self, q: torch.Tensor, ahead: torch.Tensor) -> torch.Tensor:
        """Queries turned to each of several places ``[batch, heads, query tokens, places]`` -> ``[..., head_dim]``."""
        turned = self._turned(q[..., None, :].expand(*ahead.shape, -1).flatten(2, 3), ahead.flatten(2))
        return turned.view(*ahead.shape, -1)

    def _chunk_keys(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """``[batch, heads, full chunks, head_dim]`` a key for each chunk."""
        before = call.before or {}
        known = before.get("chunks", q[:, :, :0])
        asked = torch.cat([before["asked"], q], 2) if "asked" in before else q
        count = asked.shape[2] // self.chunk
        begin = known.shape[2] * self.chunk
        inside = torch.arange(self.chunk, device=q.device).repeat(count)
        parts = [self._turned(asked[:, :, : len(inside)], inside)]
        parts += [self._turned(k[:, :, begin : begin + len(inside)], inside), v[:, :, begin : begin + len(inside)]]
        turned = [each.unflatten(2, (count, self.chunk)).flatten(1, 2) for each in parts] if count else parts
        if count:
            said = F.scaled_dot_product_attention(turned[0], turned[1], turned[2]).mean(2, keepdim=True)
            fresh = F.scaled_dot_product_attention(said, turned[1], turned[1])[:, :, 0].unflatten(1, (-1, count))
            known = torch.cat([known, fresh], 2)
        if call.before is not None:
            call.after |= {"chunks": known, "asked": asked[:, :, len(inside) :].clone()}
        return known

    def _kept(self, q: torch.Tensor, keys: torch.Tensor, chunks: int, places: torch.Tensor) -> torch.Tensor:
        """``[batch, heads, query tokens, chunks]`` the chunks a query reads."""
        scores = F.pad(q @ keys.transpose(2, 3), (0, chunks - keys.shape[2]))
        if not self.per_head:
            scores = scores.sum(1, keepdim=True).expand_as(scores)
        own, at = (places // self.chunk)[:, None], torch.arange(chunks, device=q.device)
        always = (at == 0) | (at == own) | (at == own - 1)
        scores = scores.masked_fill(always, torch.inf).masked_fill(at > own, -torch.inf)
        best = scores.topk(min(self.budget // self.chunk, chunks), -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(3, best, True) & (at <= own)

    def _weights(
        self, q: torch.Tensor, k: torch.Tensor, kept: torch.Tensor, places: torch.Tensor, call: Call
    ) -> torch.Tensor:
        """Dense weights: a query is turned once for each chunk, by how far the chunk then stands."""
        size, tokens, chunks = self.chunk, k.shape[2], kept.shape[3]
        ranks = kept.cumsum(3)
        ahead = (kept.sum(3, keepdim=True) - ranks) * size + (places % size)[:, None]
        asked = self._at_each(q * self.scale(q, call), ahead)
        inside = torch.arange(size, device=q.device)
        keys = self._turned(F.pad(k, (0, 0, 0, chunks * size - tokens)), inside.repeat(chunks))
        logits = torch.einsum("bhicd,bhcsd->bhics", asked, keys.unflatten(2, (chunks, size)))
        behind = torch.arange(chunks * size, device=q.device).view(chunks, size) <= places[:, None, None]
        met = kept[..., None] & behind
        logits = logits.masked_fill(~met, torch.finfo(logits.dtype).min)
        return logits.flatten(3).softmax(-1)[..., :tokens]

    def _gathered(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: torch.Tensor, places: torch.Tensor, call: Call
    ) -> torch.Tensor:
        """The same for a few queries: chosen chunks are fetched, nothing else is read."""
        size, chunks = self.chunk, kept.shape[3]
        at = torch.arange(chunks, device=q.device)
        few = min(self.budget // size, chunks)
        picked = torch.where(kept, at, chunks).sort(3).values[..., :few]
        inside = torch.arange(size, device=q.device)
        tokens = picked.clamp_max(chunks - 1)[..., None] * size + inside
        met = (tokens <= places[:, None, None]) & (picked < chunks)[..., None]
        tokens = tokens.clamp_max(k.shape[2] - 1)
        ahead = (kept.sum(3, keepdim=True) - 1 - torch.arange(few, device=q.device)) * size + (places % size)[:, None]
        asked = self._at_each(q * self.scale(q, call), ahead)
        keys = self._turned(take(k, tokens).flatten(2, 4), inside.repeat(tokens[0, 0, ..., 0].numel()))
        logits = torch.einsum("bhitd,bhitsd->bhits", asked, keys.view(*tokens.shape, -1))
        weights = logits.masked_fill(~met, torch.finfo(logits.dtype).min).flatten(3).softmax(-1).view_as(logits)
        return torch.einsum("bhits,bhitsd->bhid", weights, take(v, tokens))
