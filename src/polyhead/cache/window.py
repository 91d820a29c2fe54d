"""A window and sinks for each head: the plain policy, driven by a HeadMap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from polyhead.cache.base import Budgets, CachePolicy, kv_scores
from polyhead.cache.storage import Look
from polyhead.errors import InputError

if TYPE_CHECKING:
    from polyhead.headmap import HeadMap
    from polyhead.model import HeadedModel

__all__ = ["WindowPolicy", "protected_heads", "recent_and_sinks"]


def recent_and_sinks(look: Look, sinks: int) -> torch.Tensor:
    """Priorities ``[batch, heads, kept tokens]``: a text's first ``sinks`` real tokens above all, then the latest."""
    places = look.positions
    far = torch.iinfo(places.dtype).max
    first = places.masked_fill(~look.real, far).amin(2, keepdim=True)
    is_sink = look.real & (places - first < sinks)
    return places.double().masked_fill(is_sink, float(look.seen))


def protected_heads(scores: HeadMap, model: HeadedModel, share: float, count: int | None = None) -> list[np.ndarray]:
    """``[layers][kv_heads]`` True for the best ``share`` of all key-value heads, rounded up; or ``count`` of them."""
    by_layer = kv_scores(scores, model)
    flat = np.concatenate(by_layer)
    wanted = int(np.ceil(share * len(flat))) if count is None else count
    chosen = np.zeros(len(flat), dtype=bool)
    chosen[np.argsort(-flat, kind="stable")[:wanted]] = True
    return np.split(chosen, np.cumsum([len(row) for row in by_layer])[:-1])


@dataclass
class WindowPolicy(CachePolicy):
    """The best heads keep every token, the others the first few and a window of the latest.

    Args:
        scores: which heads need the whole text, such as retrieval scores; None to protect none.
        protect: share of key-value heads that keep everything, 0 to 1; 1 is the whole cache.
        window: latest tokens that the other heads keep.
        sinks: first tokens that they keep besides.

    Raises:
        InputError: values outside of these ranges, or a share to protect without scores.

    Example:
        >>> import polyhead
        >>> from polyhead.cache import WindowPolicy
        >>> model = polyhead.load("gemma-3-270m", lm_head=True)
        >>> inputs = model.tokenize(["Attention heads differ in how far they look."])
        >>> with WindowPolicy(window=4, sinks=1).on(model) as cache:
        ...     ids = model.module.generate(**inputs, past_key_values=cache, max_new_tokens=4, do_sample=False)
        >>> max(max(row) for row in cache.kept() if row)
        5
    """

    scores: HeadMap | None = None
    protect: float = 0.0
    window: int = 256
    sinks: int = 4

    name: ClassVar[str] = "window"
    summary: ClassVar[str] = "the best heads keep all tokens, others the first few and a window"

    def __post_init__(self) -> None:
        if not 0 <= self.protect <= 1 or self.window < 1 or self.sinks < 0:
            raise InputError(
                f"protect={self.protect}, window={self.window}, sinks={self.sinks} were given; expected a share from 0 "
                "to 1, a window of at least 1 token, and no less than 0 sinks."
            )
        if self.scores is None and 0 < self.protect < 1:
            raise InputError(f"protect={self.protect} was given without scores; give a HeadMap that says which heads.")

    def budgets(self, model: HeadedModel) -> Budgets:
        """See :class:`CachePolicy`."""
        if self.scores is None:
            rest = None if self.protect == 1 else self.window + self.sinks
            return [[rest] * layer.kv_heads for layer in model.attention_layers]
        chosen = protected_heads(self.scores, model, self.protect)
        return [[None if whole else self.window + self.sinks for whole in row] for row in chosen]

    def priority(self, look: Look) -> torch.Tensor:
        """See :class:`CachePolicy`."""
        return recent_and_sinks(look, self.sinks)
