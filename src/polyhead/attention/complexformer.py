"""Complex attention: each head turns queries and keys into lengths and angles, and adapts what an angle means."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import nn

from polyhead.attention.base import Attention, Positions, repeat_groups
from polyhead.attention.call import AttentionShape, Call
from polyhead.errors import InputError
from polyhead.papers import paper
from polyhead.positions.rotary import rotate

__all__ = ["ComplexAttention", "ComplexNetworkAttention"]


@paper("complexformer")
class ComplexAttention(Attention):
    """Logits ``sum_i |q_i| |k_i| cos(Adapt(arg q_i - arg k_i) + w_i (m - n)) / sqrt(head_dim)`` over complex pairs.

    Pair ``i`` is features ``i`` and ``i + head_dim / 2``; ``Adapt`` and ``w`` are learned a key-value head. "identity"
    is the difference itself: with frequencies as they start, rotary attention. "affine" is ``a d + b``, from 1 and 0.
    Both split into a part of the query and a part of the key, so logits stay inner products, in the fused kernel.
    Angles lie in (-pi, pi], so with ``a`` other than 1 an affine logit jumps where one passes pi.

    Args:
        shape: widths; an even size of a head.
        causal: whether a token sees only itself and what stands before it.
        positions: refused: heads place tokens themselves.
        adapt: "identity" or "affine".
        learn_frequencies: whether each key-value head learns a factor for each ``w_i``, from 1.
        base: ``w_i`` starts as ``base ** (-2 i / head_dim)``.

    Raises:
        InputError: an odd size of a head, another ``adapt``, or positions.

    Source:
        complexformer (Shao et al. 2025, withdrawn by its authors). Its abstract leaves ``Adapt`` open: the choices
        here are ours.

    Example:
        >>> import torch
        >>> layer = ComplexAttention(AttentionShape(32, 4), causal=True)
        >>> layer(torch.randn(1, 5, 32)).shape, layer.frequencies().shape
        (torch.Size([1, 5, 32]), torch.Size([4, 4]))
    """

    name: ClassVar[str] = "complexformer"
    summary: ClassVar[str] = "Each head adapts angles between queries and keys, and how fast places turn them"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        adapt: Literal["identity", "affine"] = "affine",
        learn_frequencies: bool = True,
        base: float = 10_000.0,
    ) -> None:
        if adapt not in ("identity", "affine") or shape.size % 2 or positions is not None:
            raise InputError(
                f"adapt={adapt!r} with heads of {shape.size} features and positions={positions!r} was given; expected "
                "'identity' or 'affine', an even number, and no positions: heads place tokens themselves."
            )
        super().__init__(shape, causal=causal)
        self.base = base
        heads, pairs = shape.groups_of, shape.size // 2
        self.stretch = nn.Parameter(torch.zeros(heads, pairs)) if learn_frequencies else None
        self.slope: nn.Parameter | None = None
        self.offset: nn.Parameter | None = None
        if adapt == "affine":
            self.slope = nn.Parameter(torch.ones(heads, pairs))
            self.offset = nn.Parameter(torch.zeros(heads, pairs))

    def frequencies(self) -> torch.Tensor:
        """``[kv_heads, head_dim / 2]`` radians a token, in float64."""
        assert self.shape is not None
        pairs = torch.arange(0, self.shape.size, 2, dtype=torch.float64, device=self.k_proj.weight.device)
        start = (self.base ** (-pairs / self.shape.size)).expand(self.shape.groups_of, -1)
        return start if self.stretch is None else start * self.stretch.double().exp()

    def position(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys, adapted and turned."""
        return self._turned(q, call.q_positions, self.offset), self._turned(k, call.k_positions, None)

    def _turned(self, states: torch.Tensor, places: torch.Tensor, offset: torch.Tensor | None) -> torch.Tensor:
        def own(values: torch.Tensor) -> torch.Tensor:
            return repeat_groups(values[None], states.shape[1])[:, :, None]

        turn = places[:, None, :, None].double() * own(self.frequencies())
        if self.slope is None:
            return rotate(states, turn)
        real, imaginary = states.chunk(2, -1)
        nothing = (real == 0) & (imaginary == 0)  # has no angle, and no slope to pass on
        angle = torch.atan2(imaginary, real.masked_fill(nothing, 1.0)) * own(self.slope)
        length = torch.hypot(real.masked_fill(nothing, 1.0), imaginary).masked_fill(nothing, 0.0)
        angle = angle.double() + turn + (0.0 if offset is None else own(offset))
        return torch.cat([length * angle.cos().to(length.dtype), length * angle.sin().to(length.dtype)], -1)


class ComplexNetworkAttention(ComplexAttention):
    """Complex attention whose ``Adapt(d)`` is ``d`` plus a small network of ``sin d`` and ``cos d`` for each head.

    The network starts at 0, as rotary attention, and has no jump at pi. It sees every pair of tokens: it takes
    ``head_dim / 2 * width`` times the memory of logits.

    Args:
        shape: widths; an even size of a head.
        causal: whether a token sees only itself and what stands before it.
        positions: refused: heads place tokens themselves.
        learn_frequencies: whether each key-value head learns a factor for each ``w_i``, from 1.
        base: ``w_i`` starts as ``base ** (-2 i / head_dim)``.
        width: units of the network.

    Raises:
        InputError: an odd size of a head, positions, or no unit.

    Source:
        complexformer (Shao et al. 2025); the network is ours.

    Example:
        >>> import torch
        >>> ComplexNetworkAttention(AttentionShape(32, 4))(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    name: ClassVar[str] = "complexformer-network"
    summary: ClassVar[str] = "A small network of the angle between query and key, a head"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        learn_frequencies: bool = True,
        base: float = 10_000.0,
        width: int = 4,
    ) -> None:
        if width < 1:
            raise InputError(f"width={width} was given; expected 1 unit or more.")
        same: dict[str, Any] = {"adapt": "identity", "learn_frequencies": learn_frequencies, "base": base}
        super().__init__(shape, causal=causal, positions=positions, **same)
        self.into = nn.Parameter(torch.randn(shape.groups_of, width, 2))
        self.out = nn.Parameter(torch.zeros(shape.groups_of, width))

    def position(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as they are: the score turns them, pair by pair."""
        return q, k

    def score(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Logits ``[batch, heads, query tokens, key tokens]``."""
        heads = q.shape[1]
        real, imaginary = (each[:, :, :, None] for each in q.chunk(2, -1))
        other, another = (each[:, :, None] for each in repeat_groups(k, heads).chunk(2, -1))
        # q conj(k) of every two tokens: its length is both lengths, its angle the difference.
        inside, across = real * other + imaginary * another, imaginary * other - real * another
        length = (inside.square() + across.square()).clamp_min(torch.finfo(q.dtype).tiny).sqrt()
        facing = torch.stack([across / length, inside / length], -1)
        into, out = repeat_groups(self.into[None], heads)[0], repeat_groups(self.out[None], heads)[0]
        told = torch.einsum("bhijpw,hw->bhijp", torch.einsum("bhijpc,hwc->bhijpw", facing, into).tanh(), out)
        apart = (call.q_positions[:, :, None] - call.k_positions[:, None, :])[:, None, ..., None]
        turn = apart * repeat_groups(self.frequencies()[None], heads)[:, :, None, None] + told
        turned = inside * turn.cos().to(q.dtype) - across * turn.sin().to(q.dtype)
        return turned.sum(-1) * self.scale(q, call)
