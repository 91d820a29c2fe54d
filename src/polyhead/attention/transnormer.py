"""TransNormer: linear attention that is normalised after mixing, and softmax inside blocks of neighbours."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.attention.base import Attention, Positions, repeat_groups
from polyhead.attention.call import AttentionShape, Call, State
from polyhead.attention.linear import LinearAttention
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["BlockDiagonalAttention", "NormAttention", "token_rms", "transnormer_layers"]


def token_rms(heads: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Heads ``[batch, heads, tokens, head_dim]`` over the root mean square of all features of their token."""
    return heads * torch.rsqrt(heads.pow(2).mean((1, 3), keepdim=True) + eps)


@paper("transnormer")
class NormAttention(LinearAttention):
    """``rms(phi(q) (phi(k)^T v)) * gain``, ``phi = 1 + elu``: a norm in place of the sum of weights.

    Dividing by the sum of weights has a gradient without bound where that sum is small; the norm has not.

    Args:
        shape: widths.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        relu: ``phi = relu`` in place of ``1 + elu``.

    Source:
        transnormer (Qin et al. 2022, section 4.1, NormAttention).

    Example:
        >>> heads = NormAttention(AttentionShape(64, 4)).heads_of(torch.randn(1, 9, 64))
        >>> round(heads[0, :, 0].pow(2).mean().item(), 3)
        1.0
    """

    name: ClassVar[str] = "transnormer"
    summary: ClassVar[str] = "Linear attention with a norm in place of the denominator"
    normalize: ClassVar[bool] = False

    def __init__(
        self, shape: AttentionShape, *, causal: bool = False, positions: Positions | None = None, relu: bool = False
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        self.relu = relu
        self.gain = nn.Parameter(torch.ones(shape.heads, 1, shape.size))

    def features(self, states: torch.Tensor, role: str) -> torch.Tensor:
        """``1 + elu`` or ``relu``."""
        return F.relu(states) if self.relu else 1 + F.elu(states)

    def finish(self, heads: torch.Tensor) -> torch.Tensor:
        """Heads of a token over their common root mean square, times the gain."""
        return token_rms(heads) * self.gain


@paper("transnormer")
class BlockDiagonalAttention(Attention):
    """Softmax attention inside blocks of ``block`` tokens, none between them (DiagAttention); time grows with tokens.

    Args:
        shape: widths; None to serve a stock model's steps.
        causal: whether a token sees only itself and what stands before it in its block.
        positions: tells queries and keys where they stand.
        block: tokens of a block, counted from the first real token.

    Raises:
        InputError: a block below 1.

    Source:
        transnormer (Qin et al. 2022, section 4.2, DiagAttention).

    Example:
        >>> layer = BlockDiagonalAttention(AttentionShape(64, 4), block=2)
        >>> layer.attention_weights(torch.randn(1, 4, 64))[0, 0].gt(0).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    name: ClassVar[str] = "transnormer-diag"
    summary: ClassVar[str] = "Softmax attention inside blocks of neighbours"
    cost: ClassVar[str] = "tokens"

    def __init__(
        self,
        shape: AttentionShape | None,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        block: int = 64,
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        if block < 1:
            raise InputError(f"{block} tokens of reach were given; expected at least 1.")
        self.block = block

    def near(self, q_places: torch.Tensor, k_places: torch.Tensor) -> torch.Tensor:
        """Which places ``[..., queries, 1]`` and ``[..., 1, keys]`` are near enough to look."""
        return q_places // self.block == k_places // self.block

    def neighbours(self) -> tuple[int, ...]:
        """Blocks looked at, counted from the own one."""
        return (0,)

    def kept(self, seen: int) -> int:
        """Tokens whose keys and values a step still needs after ``seen`` tokens."""
        return seen % self.block

    def choose(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """``[batch or 1, 1, query tokens, key tokens]``."""
        near = self.near(call.q_positions[:, :, None], call.k_positions[:, None, :])[:, None]
        allowed = call.allowed()
        return near if allowed is None else near & allowed

    def weights(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """The weights ``[batch, heads, tokens, tokens]``, of which a run forms the blocks only."""
        return super().weights(q, k, call)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
        """Heads ``[batch, heads, tokens, head_dim]``, block by block at once."""
        if call.mask is not None:
            raise InputError(f"{type(self).__name__} was given a mask of its own; it knows padding and causal only.")
        q, k = self.inner(q, k, call)
        k, v = repeat_groups(k, q.shape[1]), repeat_groups(v, q.shape[1])
        if call.padding is None:
            return self._local(q, k, v, torch.full((1,), q.shape[2], device=q.device), call.causal)
        order = (~call.padding).long().argsort(stable=True, dim=1)
        q, k, v = (each.gather(2, _wide(order, each)) for each in (q, k, v))
        heads = self._local(q, k, v, call.padding.sum(1), call.causal)
        return heads.gather(2, _wide(order.argsort(1), heads))

    def step(self, hidden: torch.Tensor, state: State | None = None) -> tuple[torch.Tensor, State]:
        """The next tokens; keys and values that nobody can reach any more are let go. See :meth:`Attention.step`."""
        q, k, v, call, state = self._begin_step(hidden, state)
        tensors = {"keys": k, "values": v}
        for name, old in state.tensors.items():
            tensors[name] = torch.cat([old, tensors[name]], 2)
        held, seen = tensors["keys"].shape[2], state.seen + hidden.shape[1]
        whole = F.pad(q, (0, 0, held - q.shape[2], 0))
        heads = self.attend(whole, tensors["keys"], tensors["values"], call)[:, :, -hidden.shape[1] :]
        left = self.kept(seen)
        return self.output(heads, call), State(
            seen, {name: each[:, :, held - left :].clone() for name, each in tensors.items()}
        )

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """Bytes of the keys and values that can still be reached."""
        assert self.shape is not None
        return 2 * self.shape.groups_of * self.shape.size * self.kept(tokens) * itemsize

    def _local(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, counts: torch.Tensor, causal: bool
    ) -> torch.Tensor:
        batch, _, tokens, _ = q.shape
        blocks = -(-tokens // self.block)
        q, k, v = (
            F.pad(each, (0, 0, 0, blocks * self.block - tokens)).unflatten(2, (blocks, self.block)).transpose(1, 2)
            for each in (q, k, v)
        )
        offsets = self.neighbours()
        k, v = (torch.cat([_shifted(each, offset) for offset in offsets], 3) for each in (k, v))
        places = torch.arange(blocks * self.block, device=q.device).view(blocks, self.block)
        seen = torch.cat([places + offset * self.block for offset in offsets], 1)
        at, to = places[:, :, None], seen[:, None, :]
        allowed = self.near(at, to) & (to >= 0) & (to < counts[:, None, None, None])
        if causal:
            allowed = allowed & (to <= at)
        allowed = (allowed | (to == at)).expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
        q, k, v = (each.flatten(0, 1) for each in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=1.0)
        return mixed.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :tokens]


def transnormer_layers(shape: AttentionShape, layers: int, causal: bool = False, block: int = 64) -> list[Attention]:
    """Attention of a TransNormer: blocks of neighbours in the first half of the layers, normalised in the second.

    Example:
        >>> [layer.name for layer in transnormer_layers(AttentionShape(64, 4), 4)]
        ['transnormer-diag', 'transnormer-diag', 'transnormer', 'transnormer']
    """
    local: list[Attention] = [BlockDiagonalAttention(shape, causal=causal, block=block) for _ in range(layers // 2)]
    return local + [NormAttention(shape, causal=causal) for _ in range(layers - len(local))]


def _wide(order: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return order[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])


def _shifted(states: torch.Tensor, offset: int) -> torch.Tensor:
    """Blocks ``[batch, blocks, ...]``, each in the place of the one it is looked at from; zeros beyond the ends."""
    if offset == 0:
        return states
    empty = torch.zeros_like(states[:, :1])
    return torch.cat([empty, states[:, :-1]], 1) if offset < 0 else torch.cat([states[:, 1:], empty], 1)
