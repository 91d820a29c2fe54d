"""New hard negatives mixed of those found (paper kalm-embedding-v2; its focal weights are ``InfoNCE(gamma=...)``)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["HardNegativeMixer"]


@paper("kalm-embedding-v2")
class HardNegativeMixer(nn.Module):
    """Makes hard negatives in embedding space, as unit vectors, without gradient to the share.

    Args:
        mode: "pair": convex pairs ``a h_i + (1 - a) h_j`` of an anchor's negatives, ``a`` from Beta(alpha, alpha);
            "list": their sum weighed by a softmax of their similarity to the anchor.
        count: mixed negatives an anchor ("list" gives one).
        alpha: of the Beta distribution.
        temperature: of the softmax.
        seed: of pairs and shares.

    Example:
        >>> import torch
        >>> from polyhead.objectives import HardNegativeMixer
        >>> mixed = HardNegativeMixer("pair", count=2)(torch.randn(3, 8), torch.randn(3, 5, 8))
        >>> mixed.shape, bool(torch.allclose(mixed.norm(dim=-1), torch.ones(3, 2)))
        (torch.Size([3, 2, 8]), True)
    """

    def __init__(
        self,
        mode: Literal["pair", "list"] = "pair",
        *,
        count: int = 1,
        alpha: float = 2.0,
        temperature: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if mode not in ("pair", "list") or count < 1 or alpha <= 0 or temperature <= 0:
            raise InputError(
                f"mode {mode!r}, count {count}, alpha {alpha}, temperature {temperature}: expected 'pair' or 'list', "
                "and numbers above 0."
            )
        self.mode = mode
        self.count = count
        self.alpha = alpha
        self.temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, anchors: Tensor, negatives: Tensor) -> Tensor:
        """Mixed negatives ``[n, count, d]`` (``[n, 1, d]`` for "list").

        Args:
            anchors: ``[n, d]``.
            negatives: ``[n, k, d]`` of each anchor, at least 2 for "pair".

        Flattened to ``[n * count, d]`` they are further columns of ``other``.
        """
        if negatives.ndim != 3 or len(negatives) != len(anchors) or (self.mode == "pair" and negatives.shape[1] < 2):
            raise InputError(
                f"Expected anchors [n, d] and negatives [n, k, d], k at least 2 for pairs; got {list(anchors.shape)} "
                f"and {list(negatives.shape)}."
            )
        unit = nn.functional.normalize(negatives, dim=-1)
        if self.mode == "list":
            with torch.no_grad():
                close = (unit @ nn.functional.normalize(anchors, dim=-1).unsqueeze(-1)).squeeze(-1)
                share = (close / self.temperature).softmax(1)
            return nn.functional.normalize((share.unsqueeze(-1) * unit).sum(1, keepdim=True), dim=-1)
        n, k = negatives.shape[:2]
        chance = torch.rand(n, self.count, k, generator=self._generator)
        first, second = chance.argsort(-1)[..., :2].to(unit.device).unbind(-1)  # two different ones
        drawn = torch._standard_gamma(torch.full((2, n, self.count, 1), self.alpha), generator=self._generator)
        share = (drawn[0] / drawn.sum(0)).to(unit)
        rows = torch.arange(n, device=unit.device)[:, None]
        return nn.functional.normalize(share * unit[rows, first] + (1 - share) * unit[rows, second], dim=-1)
