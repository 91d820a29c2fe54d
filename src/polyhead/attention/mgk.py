"""Keys as mixtures of Gaussians: every token offers several keys a head."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from polyhead.attention.base import Attention, LayerMatrices, Positions, repeat_groups
from polyhead.attention.call import AttentionShape, Call
from polyhead.attention.linear import LinearAttention
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["GaussianKeysAttention", "GaussianKeysLinearAttention"]


@paper("transformer-mgk")
class GaussianKeysAttention(Attention):
    """Weights ``~ sum_r pi_r exp(-|q_i - k_jr|^2 / (2 s_r))``, normalised over ``j``.

    ``pi`` and ``s`` are learned a head and component; ``s`` starts at ``sqrt(head_dim)``, with which one component of
    keys of equal length is plain attention.

    Args:
        shape: widths.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand (every component; before shifts).
        components: keys a token offers, M.
        keys: "project" for a projection a component, or "shift": one projection and a learned vector a component.
        estep: "soft" sums the components, "hard" takes the best one of each pair.

    Raises:
        InputError: other options, or no component.

    Source:
        transformer-mgk (Nguyen et al. 2022); its E-step that sets ``pi`` from mean responsibilities is not here.

    Example:
        >>> import torch
        >>> layer, hidden = GaussianKeysAttention(AttentionShape(32, 2)), torch.randn(1, 5, 32)
        >>> layer.responsibilities(hidden).shape
        torch.Size([1, 2, 2, 5, 5])
    """

    name: ClassVar[str] = "transformer-mgk"
    summary: ClassVar[str] = "Every token offers a mixture of Gaussian keys a head"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        components: int = 2,
        keys: Literal["project", "shift"] = "project",
        estep: Literal["soft", "hard"] = "soft",
    ) -> None:
        if components < 1 or keys not in ("project", "shift") or estep not in ("soft", "hard"):
            raise InputError(
                f"components={components}, keys={keys!r}, estep={estep!r} was given; expected 1 or more components, "
                "'project' or 'shift', 'soft' or 'hard'."
            )
        super().__init__(shape, causal=causal, positions=positions)
        self.components = components
        self.estep = estep
        self.shift: nn.Parameter | None = None
        if keys == "shift":
            self.shift = nn.Parameter(0.5 * torch.randn(shape.groups_of, components, 1, shape.size))
        elif components > 1:
            self.k_proj = nn.Linear(shape.dim, components * shape.groups_of * shape.size, bias=shape.bias)
        if estep == "soft":
            self.share = nn.Parameter(torch.zeros(shape.heads, components))
        self.width = nn.Parameter(torch.zeros(shape.heads, components))

    def score(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        """Log of the mixture, ``[batch, heads, query tokens, key tokens]``."""
        found = self._components(q, k, call)
        return found.logsumexp(2) if self.estep == "soft" else found.amax(2)

    def responsibilities(self, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
        """``[batch, heads, components, tokens, tokens]`` how far each component explains each pair; sums to 1."""
        q, k, _, call = self._prepared(hidden, padding)
        return self._components(q, k, call).softmax(2)

    def cache_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """As plain attention with ``components`` keys; shifted keys are kept once."""
        kept = 1 if self.shift is not None else self.components
        return super().cache_bytes(tokens, itemsize) * (kept + 1) // 2

    @classmethod
    def from_mha(cls, layer: LayerMatrices, **knobs: object) -> Attention:
        """Refused: distances are not inner products; the paper trains from scratch.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"{cls.__name__} was to start from a trained layer; it measures distances: train it from scratch."
        )

    def _components(self, q: torch.Tensor, k: torch.Tensor, call: Call) -> torch.Tensor:
        k = k.unflatten(1, (-1, self.components)) if self.shift is None else k[:, :, None] + self.shift
        k = repeat_groups(k, q.shape[1])
        # |q|^2 is not the same for all components where their widths differ: the whole distance counts.
        far = q.square().sum(-1)[:, :, None, :, None] + k.square().sum(-1)[:, :, :, None, :]
        far = far - 2 * q[:, :, None] @ k.transpose(3, 4)
        logits = -far * (self.scale(q, call) / 2) * (-self.width)[:, :, None, None].exp()
        return logits + self.share.log_softmax(1)[:, :, None, None] if self.estep == "soft" else logits


class GaussianKeysLinearAttention(LinearAttention):
    """The linear form: ``phi(q_i) . sum_r pi_r phi(k_jr)``, with ``phi = 1 + elu`` and ``pi`` learned a head.

    Args:
        shape: widths.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        components: keys a token offers.

    Raises:
        InputError: no component.

    Source:
        transformer-mgk, the linear form.

    Example:
        >>> import torch
        >>> GaussianKeysLinearAttention(AttentionShape(32, 2))(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    name: ClassVar[str] = "transformer-mgk-linear"
    summary: ClassVar[str] = "Linear attention over a mixture of keys a token"

    def __init__(
        self, shape: AttentionShape, *, causal: bool = False, positions: Positions | None = None, components: int = 2
    ) -> None:
        if components < 1:
            raise InputError(f"components={components} was given; expected 1 or more.")
        super().__init__(shape, causal=causal, positions=positions)
        self.components = components
        self.k_proj = nn.Linear(shape.dim, components * shape.groups_of * shape.size, bias=shape.bias)
        self.share = nn.Parameter(torch.zeros(shape.groups_of, components))

    def features(self, states: torch.Tensor, role: str) -> torch.Tensor:
        """``1 + elu``; of keys, the mixture of a token's."""
        found = 1 + F.elu(states)
        if role == "query":
            return found
        return (found.unflatten(1, (-1, self.components)) * self.share.softmax(1)[:, :, None, None]).sum(2)
