"""HeadKV: a head's budget grows with what it is worth, and attention of the last tokens says which ones stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch.nn import functional as F

from polyhead.cache.base import Budgets, CachePolicy, kv_scores
from polyhead.cache.storage import Look
from polyhead.errors import InputError
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.headmap import HeadMap
    from polyhead.model import HeadedModel

__all__ = ["HeadKVPolicy", "allocate_budget"]


def allocate_budget(scores: np.ndarray, base: int, beta: float) -> np.ndarray:
    """``b_h = base - base / beta + S_h (heads x base / beta)`` in whole tokens, whose sum is exactly ``heads x base``.

    Args:
        scores: ``[heads]`` of all layers, not negative; normalised to a sum of 1 here.
        base: mean tokens a head.
        beta: a share ``1 / beta`` of every head's tokens is pooled and given out by score.

    Raises:
        InputError: a base below 1, a beta below 1, or negative scores.

    Source:
        headkv (Fu et al. 2024, section 3.2).

    Example:
        >>> allocate_budget(np.array([3.0, 1.0, 0.0, 0.0]), base=8, beta=2.0).tolist()
        [16, 8, 4, 4]
    """
    if base < 1 or beta < 1 or not np.isfinite(scores).all() or (scores < 0).any():
        raise InputError(
            f"base={base}, beta={beta} and scores from {np.min(scores)} were given; expected a base and a beta of at "
            "least 1, and scores that are numbers from 0."
        )
    shares = scores / scores.sum() if scores.sum() > 0 else np.full(len(scores), 1 / len(scores))
    exact = base - base / beta + shares * (len(scores) * base / beta)
    whole = np.floor(exact).astype(int)
    rest = len(scores) * base - whole.sum()
    whole[np.argsort(-(exact - whole), kind="stable")[:rest]] += 1
    return whole


@paper("headkv")
@dataclass
class HeadKVPolicy(CachePolicy):
    """After the first pass each head keeps its last tokens and those that these look at most.

    Args:
        scores: what heads are worth, such as retrieval scores on needles; the highest of a group counts.
        base: mean tokens a key-value head keeps of what stands before the last ``observe``.
        beta: a share ``1 / beta`` of the tokens is given out by score; 1 for all of them.
        observe: latest tokens, always kept, whose attention chooses among the others.
        pool: width of the average over neighbours that attention is smoothed with; odd.

    Source:
        headkv (Fu et al. 2024, sections 3.1 and 3.2); the choice of tokens is SnapKV's.

    Raises:
        InputError: counts below 1, or an even ``pool``.
    """

    scores: HeadMap
    base: int = 128
    beta: float = 1.2
    observe: int = 8
    pool: int = 5

    name: ClassVar[str] = "headkv"
    summary: ClassVar[str] = "budgets by what heads are worth, tokens by what the last ones look at"
    once: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.base, self.observe, self.pool) < 1 or self.pool % 2 == 0:
            raise InputError(
                f"base={self.base}, observe={self.observe}, pool={self.pool} were given; expected counts of at least "
                "1, and an odd pool."
            )

    def budgets(self, model: HeadedModel) -> Budgets:
        """See :class:`CachePolicy`. Layers with the model's own sliding window take no part."""
        own = [layer.sliding_window is None for layer in model.attention_layers]
        by_layer = kv_scores(self.scores, model)
        flat = np.concatenate([row for row, counts in zip(by_layer, own, strict=True) if counts])
        given = iter(allocate_budget(np.maximum(flat, 0), self.base, self.beta))
        return [
            [int(next(given)) + self.observe if counts else None for _ in row]
            for row, counts in zip(by_layer, own, strict=True)
        ]

    def priority(self, look: Look) -> torch.Tensor:
        """See :class:`CachePolicy`."""
        queries = look.queries[:, :, :, -self.observe :]
        logits = torch.einsum("bhgqd,bhkd->bhgqk", queries.float() * look.scale, look.keys.float())
        here = torch.arange(look.seen - queries.shape[3], look.seen, device=look.keys.device)
        seen = look.positions[:, :, None] <= here[:, None]
        seen = seen & look.real[:, :, None]
        weights = logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        looked = weights.mean((2, 3))
        smooth = F.avg_pool1d(looked, self.pool, 1, self.pool // 2)
        latest = look.positions >= look.seen - self.observe
        return smooth.masked_fill(latest, torch.inf)
