"""RazorAttention: heads that look back keep everything, others a window and one token for all they dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from polyhead.cache.base import Budgets, CachePolicy
from polyhead.cache.storage import Look
from polyhead.cache.window import protected_heads, recent_and_sinks
from polyhead.errors import InputError
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.headmap import HeadMap
    from polyhead.model import HeadedModel

__all__ = ["RazorPolicy"]


@paper("razor-attention")
@dataclass
class RazorPolicy(CachePolicy):
    """Protected heads keep every token; the others sinks, a window, and one token that stands for the dropped ones.

    The compensation token's key and value are the means of the dropped keys and values, and it enters softmax with
    the weight of as many tokens as were dropped: ``log N`` is added to its logit.

    Args:
        induction: how much each head attends to what followed an earlier copy of its token.
        echo: how much it attends to the earlier copy itself; None to protect by ``induction`` alone.
        protect_induction: share of key-value heads protected for induction (the paper's 14%).
        protect_echo: share protected for echo (the paper's 1%).
        sinks: first tokens that other heads keep.
        window: latest tokens that they keep (the paper: the larger of 4,000 and a fifth of the text).
        compensate: whether one token stands for the dropped ones.

    Source:
        razor-attention (Tang et al. 2024, section 3).

    Raises:
        InputError: shares outside of 0 to 1, or an empty window.
    """

    induction: HeadMap
    echo: HeadMap | None = None
    protect_induction: float = 0.14
    protect_echo: float = 0.01
    sinks: int = 4
    window: int = 4000
    compensate: bool = True

    name: ClassVar[str] = "razor"
    summary: ClassVar[str] = "heads that look back keep all tokens, others a window and one token for the rest"

    def __post_init__(self) -> None:
        shares = (self.protect_induction, self.protect_echo)
        if not all(0 <= share <= 1 for share in shares) or self.window < 1 or self.sinks < 0:
            raise InputError(
                f"Shares {shares}, window={self.window} and sinks={self.sinks} were given; expected shares from 0 to "
                "1, a window of at least 1 token, and no less than 0 sinks."
            )

    @property
    def compensates(self) -> bool:
        """See :class:`CachePolicy`."""
        return self.compensate

    def budgets(self, model: HeadedModel) -> Budgets:
        """See :class:`CachePolicy`."""
        chosen = protected_heads(self.induction, model, self.protect_induction)
        if self.echo is not None:
            more = protected_heads(self.echo, model, self.protect_echo)
            chosen = [np.logical_or(*rows) for rows in zip(chosen, more, strict=True)]
        return [[None if whole else self.window + self.sinks for whole in row] for row in chosen]

    def priority(self, look: Look) -> torch.Tensor:
        """See :class:`CachePolicy`."""
        return recent_and_sinks(look, self.sinks)
