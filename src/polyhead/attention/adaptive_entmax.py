"""Sparse attention weights: alpha-entmax in the place of softmax, with alpha learned head by head."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import nn

from polyhead.attention.base import Attention, Positions
from polyhead.attention.call import AttentionShape
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["EntmaxAttention", "density", "disagreement", "entmax", "entmax15"]

_LEAST = 1.0 + 1e-4


def entmax15(logits: torch.Tensor) -> torch.Tensor:
    """``p = relu(z / 2 - tau)^2`` over the last axis, with the ``tau`` that makes it sum to 1.

    ``tau`` is the root of ``|relu(z / 2 - tau)|_2 = 1``, which is convex in ``tau``: Newton steps from the left never
    overshoot, and on the true support one quadratic equation gives the root exactly.

    Args:
        logits: ``[..., n]``; the dtype's minimum where nothing may be put.

    Returns:
        The shape and dtype of ``logits``, rows of sum 1.

    Source:
        adaptive-entmax (Correia et al. 2019), at alpha 1.5.

    Example:
        >>> import torch
        >>> [round(each, 3) for each in entmax15(torch.tensor([1.0, 0.8, -3.0])).tolist()]
        [0.571, 0.429, 0.0]
    """
    found: torch.Tensor = _Entmax15.apply(logits)
    return found


def entmax(logits: torch.Tensor, alpha: torch.Tensor | float) -> torch.Tensor:
    """alpha-entmax ``p = relu((alpha - 1) z - tau)^(1 / (alpha - 1))`` over the last axis, differentiable in alpha too.

    Args:
        logits: ``[..., n]``.
        alpha: in [1, 2], a number or a tensor that broadcasts over ``logits`` with a last axis of 1. 1 is softmax
            (taken at 1.0001 in a tensor), 2 the projection onto the simplex.

    Returns:
        The shape and dtype of ``logits``, rows of sum 1.

    Raises:
        InputError: a number outside of [1, 2], or a tensor whose last axis is not 1.

    Source:
        adaptive-entmax (Correia et al. 2019), with the gradient of alpha derived there.
    """
    if not isinstance(alpha, torch.Tensor):
        if not 1 <= alpha <= 2:
            raise InputError(f"alpha={alpha} was given; expected 1 (softmax) to 2 (sparsemax).")
        if alpha == 1:
            return logits.softmax(-1)
        if alpha == 1.5:
            return entmax15(logits)
        alpha = torch.full((1,), float(alpha), dtype=_wide(logits), device=logits.device)
    if not alpha.dim() or alpha.shape[-1] != 1:
        raise InputError(f"alpha of shape {list(alpha.shape)} was given; expected a last axis of 1: one alpha a row.")
    found: torch.Tensor = _Entmax.apply(logits, alpha)
    return found


class _Entmax15(torch.autograd.Function):
    """Values by Newton steps on a convex norm, gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor) -> torch.Tensor:
        z = logits.to(_wide(logits)) / 2
        z = z - z.amax(-1, keepdim=True)
        tau = torch.full_like(z[..., :1], -1.0)
        for _ in range(_NEWTON_15):
            above = (z - tau).clamp_(min=0)
            norm = torch.linalg.vector_norm(above, dim=-1, keepdim=True)
            tau = tau + (norm - 1) * norm / above.sum(-1, keepdim=True)
        above = (z - tau).clamp_(min=0)
        # On the support found: sum (above - step)^2 = 1, the smaller root.
        count = (above > 0).sum(-1, keepdim=True)
        total, squares = above.sum(-1, keepdim=True), above.square().sum(-1, keepdim=True)
        step = (squares - 1) / (total + (total.square() - count * (squares - 1)).clamp_min(0).sqrt())
        root = above.sub_(step).clamp_(min=0)
        root = torch.where(z > tau, root, 0.0)
        ctx.save_for_backward(root)
        ctx.dtype = logits.dtype
        return root.square().to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (root,) = ctx.saved_tensors
        inside = root * grads[0]
        shared = inside.sum(-1, keepdim=True) / root.sum(-1, keepdim=True)
        return torch.addcmul(inside, root, shared, value=-1).to(ctx.dtype)


_NEWTON_15 = 6


class _Entmax(torch.autograd.Function):
    """As above with any alpha in (1, 2], and alpha's gradient."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        wide = _wide(logits)
        less = alpha.to(wide).clamp(_LEAST, 2.0) - 1
        power = 1 / less
        z = (logits.to(wide) - logits.to(wide).amax(-1, keepdim=True)) * less
        tau = torch.full_like(z[..., :1], -1.0)
        for _ in range(12):
            above = (z - tau).clamp_(min=0)
            slope = torch.where(above > 0, above ** (power - 1), 0.0)
            mass = (above * slope).sum(-1, keepdim=True)
            tau = tau + (mass - mass ** (1 - less)) / slope.sum(-1, keepdim=True)
        p = (z - tau).clamp_(min=0) ** power
        p = p / p.sum(-1, keepdim=True)
        ctx.save_for_backward(p, less)
        ctx.types = logits.dtype, alpha.dtype, alpha.shape
        return p.to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        p, less = ctx.saved_tensors
        dtype, alpha_dtype, shape = ctx.types
        grad = grads[0].to(p.dtype)
        slope = torch.where(p > 0, p ** (1 - less), 0.0)
        skewed = slope / slope.sum(-1, keepdim=True)
        own = slope * (grad - (skewed * grad).sum(-1, keepdim=True))
        if not ctx.needs_input_grad[1]:
            return own.to(dtype), None
        entropy = -torch.special.xlogy(p, p)
        turned = (p - skewed) / less.square() + (entropy - skewed * entropy.sum(-1, keepdim=True)) / less
        return own.to(dtype), (grad * turned).sum_to_size(shape).to(alpha_dtype)


def _wide(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


@paper("adaptive-entmax")
class EntmaxAttention(Attention):
    """Attention whose weights are alpha-entmax of the logits: weak links get exactly zero.

    Args:
        shape: widths; may be None (for ``register``) with a fixed alpha.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        alpha: "learn" for ``1 + sigmoid(a)`` with one learned ``a`` a head, started at 1.5; or a number in [1, 2].

    Raises:
        InputError: another alpha, or a learned one without a shape.

    Source:
        adaptive-entmax (Correia et al. 2019).

    Example:
        >>> import torch
        >>> layer = EntmaxAttention(AttentionShape(32, 4), alpha=1.5)
        >>> weights = layer.attention_weights(4 * torch.randn(1, 9, 32))
        >>> bool((weights == 0).any()), weights.shape
        (True, torch.Size([1, 4, 9, 9]))
    """

    name: ClassVar[str] = "adaptive-entmax"
    summary: ClassVar[str] = "Weights by alpha-entmax, exact zeros, alpha learned a head"

    def __init__(
        self,
        shape: AttentionShape | None,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        alpha: float | Literal["learn"] = "learn",
    ) -> None:
        super().__init__(shape, causal=causal, positions=positions)
        self.fixed: float | None = None
        if alpha == "learn":
            if shape is None:
                raise InputError("alpha='learn' was asked for without a shape; give one, or a number for alpha.")
            self.sharpness = nn.Parameter(torch.zeros(shape.heads))
        elif isinstance(alpha, str) or not 1 <= alpha <= 2:
            raise InputError(f"alpha={alpha!r} was given; expected 'learn' or a number from 1 to 2.")
        else:
            self.fixed = float(alpha)

    @property
    def alpha(self) -> torch.Tensor:
        """``[heads]`` the exponent of each head (one number where it is fixed)."""
        return torch.tensor([self.fixed]) if self.fixed is not None else 1 + self.sharpness.sigmoid()

    def weigh(self, logits: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Weights of the shape of ``logits``, zero where looking is not allowed and where it is not worth it."""
        if allowed is not None:
            logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        return entmax(logits, self.fixed if self.fixed is not None else self.alpha[:, None, None])


def density(weights: torch.Tensor) -> torch.Tensor:
    """``[heads]`` share of weights ``[batch, heads, queries, keys]`` that is not zero."""
    return (weights > 0).to(_wide(weights)).mean((0, 2, 3))


def disagreement(weights: torch.Tensor) -> torch.Tensor:
    """Mean Jensen-Shannon divergence of the heads' rows, in nats: 0 where all look alike.

    Args:
        weights: ``[batch, heads, queries, keys]``.

    Returns:
        A number from 0 to log(heads).
    """
    together = weights.mean(1)
    mixed = -torch.special.xlogy(together, together).sum(-1)
    own = -torch.special.xlogy(weights, weights).sum(-1).mean(1)
    return (mixed - own).mean()
