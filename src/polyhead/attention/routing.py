"""Routing attention: tokens meet in clusters of what they say, wherever they stand."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from polyhead.attention._gather import take
from polyhead.attention.base import Attention, LayerMatrices, Positions, Triple
from polyhead.attention.call import AttentionShape, Call
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["RoutingAttention"]


@paper("routing-transformer")
class RoutingAttention(Attention):
    """Some heads look at the last ``window`` tokens, the others at ``window`` tokens of a cluster.

    Queries and keys of routing heads are layer-normed without scale and bias, and clustered by the cosine with
    ``clusters`` centroids, which follow them as a moving average while training and take no gradient.

    In both directions each centroid takes the ``window`` queries and keys nearest to it, these attend among themselves,
    and a token in several clusters is the mean of what they say (zero in none). In order, a taking of the
    nearest would let later tokens push out earlier ones: there keys are the queries, as in the paper, and a token
    attends to the last ``window`` tokens of the cluster it is nearest to itself.

    Args:
        shape: widths, with a key-value head for each query head.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys of local heads where they stand; routing heads go by content.
        local_heads: heads with a local window, the first; None for half.
        clusters: centroids a routing head. The paper takes about ``sqrt(tokens)``, and ``window = tokens / clusters``.
        window: tokens attended to.
        decay: of the moving average.

    Raises:
        InputError: grouped keys, counts below 1, or a decay outside [0, 1].

    Source:
        routing-transformer (Roy et al. 2020, section 4, algorithm 1). Centroids move to the mean of those
        assigned, where the algorithm adds their sum.

    Example:
        >>> layer = RoutingAttention(AttentionShape(64, 4), causal=True, clusters=8, window=16)
        >>> layer.assignments(torch.randn(1, 100, 64)).shape
        torch.Size([1, 2, 100])
    """

    name: ClassVar[str] = "routing-transformer"
    summary: ClassVar[str] = "Tokens attend within clusters of like queries and keys, other heads locally"
    cost: ClassVar[str] = "tokens"
    centroids: torch.Tensor

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        local_heads: int | None = None,
        clusters: int = 16,
        window: int = 64,
        decay: float = 0.999,
    ) -> None:
        self.local_heads = shape.heads // 2 if local_heads is None else local_heads
        if shape.groups_of != shape.heads or not 0 <= self.local_heads <= shape.heads:
            raise InputError(
                f"{self.local_heads} local heads of {shape.heads} with {shape.groups_of} key-value heads were given; "
                "expected at most as many as there are heads, each with keys of its own."
            )
        if clusters < 1 or window < 1 or not 0 <= decay <= 1:
            raise InputError(
                f"clusters={clusters}, window={window} and decay={decay} were given; expected counts from 1 and a "
                "decay from 0 to 1."
            )
        super().__init__(shape, causal=causal, positions=positions)
        self.window = window
        self.decay = decay
        self.register_buffer("centroids", torch.randn(shape.heads - self.local_heads, clusters, shape.size))

    def make_projections(self, shape: AttentionShape) -> None:
        """Stock ones; in order, routing heads have no keys besides their queries."""
        super().make_projections(shape)
        if self.causal:
            del self.k_proj
            if self.local_heads:
                self.k_proj = torch.nn.Linear(shape.dim, self.local_heads * shape.size, bias=shape.bias)

    def project(self, hidden: torch.Tensor) -> Triple:
        """Queries, keys and values; those of routing heads normed."""
        q, v = self.split(self.q_proj(hidden)), self.split(self.v_proj(hidden))
        k = q[:, :0] if self.causal and not self.local_heads else self.split(self.k_proj(hidden))
        local, routed = q[:, : self.local_heads], _normed(q[:, self.local_heads :])
        others = routed if self.causal else _normed(k[:, self.local_heads :])
        return torch.cat([local, routed], 1), torch.cat([k[:, : self.local_heads], others], 1), v

    def position(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Local heads, told where they stand."""
        at = self.local_heads
        near, far = super().position(q[:, :at], k[:, :at], call) if at else (q[:, :0], k[:, :0])
        return torch.cat([near, q[:, at:]], 1), torch.cat([far, k[:, at:]], 1)

    def assignments(self, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """``[batch, routing heads, tokens]`` the cluster whose centroid a query is nearest to; -1 at padding."""
        q = self._prepared(hidden, padding)[0]
        nearest = self._likeness(q[:, self.local_heads :]).argmax(2)
        return nearest if padding is None else nearest.masked_fill(~padding[:, None], -1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads ``[batch, heads, tokens, head_dim]``, window by window and cluster by cluster at once."""
        at = self.local_heads
        if q.shape[2] != k.shape[2]:
            return super().attend(q, k, v, call)
        if self.training:
            self._follow(q[:, at:], k[:, at:], call.padding)
        q, k = self.inner(q, k, call)
        if call.causal:
            return self._sorted_windows(q, k, v, self._groups(k, call), True)
        near = self._sorted_windows(q[:, :at], k[:, :at], v[:, :at], self._groups(k[:, :at], call), False)
        return torch.cat([near, self._clustered(q[:, at:], k[:, at:], v[:, at:], call.padding)], 1)

    def choose(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """``[batch, heads, query tokens, key tokens]`` who meets whom in a window or a cluster."""
        at = self.local_heads
        if call.causal:
            groups = self._groups(k, call)
            ranks = F.one_hot(groups, int(self.centroids.shape[1]) + 1).cumsum(2).gather(3, groups[..., None])[..., 0]
            mine = slice(k.shape[2] - q.shape[2], None)
            apart = ranks[:, :, mine, None] - ranks[:, :, None, :]
            met = (groups[:, :, mine, None] == groups[:, :, None, :]) & (apart < self.window)
        else:
            near = (call.q_positions[:, :, None] - call.k_positions[:, None, :]).abs() < self.window
            queries, keys = (self._members(each[:, at:], call.padding) for each in (q, k))
            far = (queries.to(q.dtype).transpose(2, 3) @ keys.to(q.dtype)) > 0
            met = torch.cat([near[:, None].expand(len(q), at, -1, -1), far], 1)
        allowed = call.allowed()
        return met if allowed is None else met & allowed

    def weights(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Weights ``[batch, heads, tokens, tokens]``; in both directions this takes ``clusters`` times their memory."""
        if call.causal:
            return super().weights(q, k, call)
        at, logits, met = self.local_heads, self.score(q, k, call), self.choose(q, k, call)
        queries, keys = (self._members(each[:, at:], call.padding) for each in (q, k))
        both = queries[..., None] & keys[..., None, :]
        each = logits[:, at:, None].masked_fill(~both, torch.finfo(logits.dtype).min).softmax(-1) * both
        routed = each.sum(2) / queries.sum(2).clamp_min(1)[..., None]
        return torch.cat([self.weigh(logits[:, :at], met[:, :at]), routed], 1)

    @classmethod
    def from_mha(cls, layer: LayerMatrices, **knobs: Any) -> Attention:
        """Refused: the paper trains its heads from nothing."""
        raise InputError("RoutingAttention norms its queries and keys; train it, it has no conversion.")

    def _likeness(self, states: torch.Tensor) -> torch.Tensor:
        """``[batch, heads, clusters, tokens]`` cosines, up to a factor, of ``[batch, heads, tokens, head_dim]``."""
        return F.normalize(self.centroids, dim=-1) @ states.transpose(2, 3)

    def _groups(self, keys: torch.Tensor, call: Call) -> torch.Tensor:
        """``[batch, heads, tokens]`` the cluster of each token, 0 in local heads; padding has a group of its own."""
        batch, heads, tokens, _ = keys.shape
        groups = torch.zeros(batch, min(heads, self.local_heads), tokens, dtype=torch.long, device=keys.device)
        if heads > self.local_heads:
            groups = torch.cat([groups, self._likeness(keys[:, self.local_heads :]).argmax(2)], 1)
        if call.padding is None:
            return groups
        return groups.masked_fill(~call.padding[:, None], self.centroids.shape[1])

    def _sorted_windows(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: torch.Tensor, causal: bool
    ) -> torch.Tensor:
        """Attention to tokens of the same group less than a window away, once tokens are sorted by group."""
        tokens, size = q.shape[2], min(self.window, q.shape[2])
        order = groups.argsort(dim=2, stable=True)
        blocks = -(-tokens // size)
        spare = blocks * size - tokens
        q, k, v = (F.pad(take(each, order), (0, 0, 0, spare)).unflatten(2, (blocks, size)) for each in (q, k, v))
        named = F.pad(groups.gather(2, order), (0, spare), value=-1).unflatten(2, (blocks, size))
        places = torch.arange(blocks * size, device=q.device).view(blocks, size)
        k, v = (_beside(each, 0.0, causal) for each in (k, v))
        apart = places[..., None] - _beside(places[None, None, ..., None], -tokens, causal)[..., 0][..., None, :]
        apart = apart if causal else apart.abs()
        met = (apart >= 0) & (apart < self.window)
        met = met & (named[..., None] == _beside(named[..., None], -2, causal)[..., 0][..., None, :])
        q, k, v = (each.flatten(1, 2) for each in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=met.flatten(1, 2), scale=1.0)
        mixed = mixed.unflatten(1, (-1, blocks)).flatten(2, 3)[:, :, :tokens]
        return take(mixed, order.argsort(2))

    def _chosen(self, states: torch.Tensor, padding: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """``[batch, heads, clusters, window]`` tokens nearest to each centroid, and which of them are real."""
        likeness = self._likeness(states)
        if padding is not None:
            likeness = likeness.masked_fill(~padding[:, None, None], -torch.inf)
        index = likeness.topk(min(self.window, states.shape[2]), -1).indices
        if padding is None:
            return index, torch.ones_like(index, dtype=torch.bool)
        return index, padding[:, None].expand(-1, index.shape[1], -1).gather(2, index.flatten(2)).view_as(index)

    def _members(self, states: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """``[batch, heads, clusters, tokens]`` which tokens a centroid takes."""
        index, real = self._chosen(states, padding)
        empty = torch.zeros(*index.shape[:3], states.shape[2], dtype=torch.bool, device=states.device)
        return empty.scatter(3, index, real)

    def _clustered(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention inside each cluster, and the mean over the clusters of a token."""
        (asked, real), (seen, there) = self._chosen(q, padding), self._chosen(k, padding)
        q, keys, values = (take(each, index).flatten(1, 2) for each, index in ((q, asked), (k, seen), (v, seen)))
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=there.flatten(1, 2)[:, :, None], scale=1.0)
        said = (F.pad(mixed, (0, 1), value=1.0) * real.flatten(1, 2)[..., None]).unflatten(1, asked.shape[1:3])
        into = asked.flatten(2)[..., None].expand(-1, -1, -1, said.shape[-1])
        total = torch.zeros_like(F.pad(v, (0, 1))).scatter_add(2, into, said.flatten(2, 3))
        return total[..., :-1] / total[..., -1:].clamp_min(1)

    @torch.no_grad()
    def _follow(self, q: torch.Tensor, k: torch.Tensor, padding: torch.Tensor | None) -> None:
        """Move centroids towards the mean of the queries and keys nearest to them."""
        points = torch.cat([q, k], 2)
        near = F.one_hot(self._likeness(points).argmax(2), self.centroids.shape[1]).to(points.dtype)
        if padding is not None:
            near = near * padding.repeat(1, 2)[:, None, :, None]
        count = near.sum((0, 2))[..., None]
        mean = torch.einsum("bhtc,bhtd->hcd", near, points) / count.clamp_min(1)
        self.centroids.lerp_(torch.where(count > 0, mean, self.centroids), 1 - self.decay)


def _normed(states: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(states, states.shape[-1:])


def _beside(blocks: torch.Tensor, empty: float, causal: bool) -> torch.Tensor:
    """``[batch, heads, blocks, size, features]``: the block before, the own one and, unless causal, the one behind."""
    beyond = torch.full_like(blocks[:, :, :1], empty)
    parts = [torch.cat([beyond, blocks[:, :, :-1]], 2), blocks]
    return torch.cat(parts if causal else [*parts, torch.cat([blocks[:, :, 1:], beyond], 2)], 3)
