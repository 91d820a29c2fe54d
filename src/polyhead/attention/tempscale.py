"""TempScale: one temperature for every softmax, and how much of what tells tokens apart attention lets through."""

from __future__ import annotations

from typing import ClassVar

import torch

from polyhead.attention.base import Attention, Positions
from polyhead.attention.call import AttentionShape, Call
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["TempScaleAttention", "high_frequency_gain"]


@paper("tempscale-length-collapse")
class TempScaleAttention(Attention):
    """``softmax(q k^T / (tau sqrt(head_dim))) v``: attention of a trained model made sharper, without training.

    It has no parameters of its own: ``from_mha`` takes a trained layer's, and with ``shape=None`` it registers as an
    attention of transformers. :class:`polyhead.act.Temperature` does the same to chosen heads of a model, for a while.

    Args:
        shape: widths; None for the steps alone.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        tau: the temperature; the paper tries a few a little below 1.

    Raises:
        InputError: a temperature that is not above 0.

    Source:
        tempscale-length-collapse (Zhou et al. 2024).

    Example:
        >>> from polyhead.attention import register
        >>> register(TempScaleAttention(None, tau=0.9))
        'polyhead_tempscale_length_collapse'
    """

    name: ClassVar[str] = "tempscale-length-collapse"
    summary: ClassVar[str] = "One temperature for every softmax"

    def __init__(
        self,
        shape: AttentionShape | None,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        tau: float = 0.9,
    ) -> None:
        if not tau > 0:
            raise InputError(f"tau={tau} was given; expected a number above 0, such as 0.9 (sharper) or 1.1 (flatter).")
        super().__init__(shape, causal=causal, positions=positions)
        self.tau = tau

    def scale(self, q: torch.Tensor, call: Call) -> float:
        """Factor of the logits: the stock one over the temperature."""
        return super().scale(q, call) / self.tau


@paper("tempscale-length-collapse")
def high_frequency_gain(weights: torch.Tensor, steps: int = 32) -> torch.Tensor:
    """Most that attention can keep of differences between tokens: the largest singular value of ``(I - 11^T/n) A``.

    The mean over tokens goes through a row-stochastic ``A`` whole; all else shrinks by this factor or more, and the
    paper shows that it falls with length.

    Args:
        weights: ``[..., tokens, tokens]``, rows that sum to 1, no padding.
        steps: of power iteration; the value is from below, near to a thousandth where no second value is as large.

    Returns:
        ``[...]``; 0 where every token attends alike.

    Raises:
        InputError: weights that are not square.

    Example:
        >>> high_frequency_gain(torch.eye(4)).item(), high_frequency_gain(torch.full((4, 4), 0.25)).item()
        (1.0, 0.0)
    """
    if weights.dim() < 2 or weights.shape[-1] != weights.shape[-2]:
        raise InputError(f"Weights {list(weights.shape)} were given; expected [..., tokens, tokens].")
    apart = weights - weights.mean(-2, keepdim=True)
    start = torch.randn(weights.shape[-1], 1, generator=torch.Generator().manual_seed(0)).to(weights)
    seen = start.expand(*weights.shape[:-2], -1, -1)
    tiny = torch.finfo(weights.dtype).tiny
    for _ in range(steps):
        seen = apart.transpose(-1, -2) @ (apart @ seen)
        seen = seen / seen.norm(dim=-2, keepdim=True).clamp_min(tiny)
    return (apart @ seen).norm(dim=(-2, -1))
