"""Put something else in the place of a head's output: a vector, its mean over texts, or what another run gave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from polyhead.act.base import HeadAction
from polyhead.act.vectors import Heads, VectorAction, head_mask, mean_heads
from polyhead.errors import InputError

if TYPE_CHECKING:
    from polyhead.heads.base import Progress
    from polyhead.model import HeadedModel
    from polyhead.recording import Recording

__all__ = ["MeanAblate", "Replace", "ReplaceRecorded"]


class Replace(VectorAction):
    """A fixed vector takes the place of a head's output: ``z_h <- v_h``, at every token or at some.

    Args:
        vectors: ``[layers, heads, head_dim]``.
        heads: which heads; None for all.
        positions: which tokens, see :class:`VectorAction`.
    """

    name: ClassVar[str] = "replace"
    summary: ClassVar[str] = "put a fixed vector in the place of a head's output"

    def altered(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """See :class:`VectorAction`."""
        return self.vector(layer, heads).expand_as(heads)


class MeanAblate(Replace):
    """A head's mean output over the tokens of some texts takes its place: it says nothing of the text any more.

    Milder than zero: what a head always adds stays. Make it with :meth:`fit`; the arguments are those of
    :class:`Replace`.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> action = MeanAblate.fit(model, ["some texts", "to take the mean over"], heads=[(5, 3)])
        >>> action.vectors.shape
        torch.Size([6, 12, 32])
    """

    name: ClassVar[str] = "mean-ablate"
    summary: ClassVar[str] = "put a head's mean over texts in the place of its output"

    @classmethod
    def fit(
        cls,
        model: HeadedModel,
        texts: Sequence[str],
        heads: Heads = None,
        *,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> MeanAblate:
        """Take the mean of every head over all tokens of ``texts``, padding left out; ablate ``heads``."""
        means = mean_heads(model, texts, batch_size=batch_size, progress=progress)
        return cls(means, heads)


class ReplaceRecorded(HeadAction):
    """What a head gave in another run takes the place of its output: activation patching.

    Args:
        recorded: a :class:`Recording` of "heads" (all layers), or ``[batch, layers, heads, tokens, head_dim]``. The
            run it is used in needs as many tokens, and as many rows unless one row was recorded.
        heads: which heads; None for all.

    Example:
        >>> import polyhead, torch
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> with model.record("heads") as other, torch.no_grad():
        ...     _ = model(**model.tokenize(["the cat sat"]))
        >>> with ReplaceRecorded(other, heads=[(5, 3)]).on(model), torch.no_grad():
        ...     _ = model(**model.tokenize(["the dog ran"]))
    """

    name: ClassVar[str] = "replace-recorded"
    summary: ClassVar[str] = "put what a head gave in another run in the place of its output"

    def __init__(self, recorded: Recording | np.ndarray | torch.Tensor, heads: Heads = None) -> None:
        given = recorded if isinstance(recorded, (np.ndarray, torch.Tensor)) else recorded.heads
        self.recorded = torch.as_tensor(given)
        if self.recorded.dim() != 5:
            raise InputError(
                f"Recorded heads have the shape {list(self.recorded.shape)}, expected [batch, layers, heads, tokens, "
                "head_dim] as model.record('heads') gives them."
            )
        self.chosen = head_mask(heads, *self.recorded.shape[1:3])

    def check(self, model: HeadedModel) -> None:
        """See :class:`HeadAction`."""
        if self.chosen.shape != (model.layers, model.heads):
            raise InputError(
                f"{list(self.chosen.shape)} layers and heads were recorded; '{model.name}' has "
                f"{[model.layers, model.heads]}. Record all layers of the same model."
            )

    def change(self, layer: int, heads: torch.Tensor) -> torch.Tensor | None:
        """See :class:`HeadAction`."""
        if not bool(self.chosen[layer].any()):
            return None
        other = self.recorded[:, layer].movedim(1, 2).to(heads.device, heads.dtype)
        if other.shape[1:] != heads.shape[1:] or other.shape[0] not in (1, heads.shape[0]):
            raise InputError(
                f"The recorded run has {other.shape[0]} rows of {other.shape[1]} tokens, this one {heads.shape[0]} "
                f"rows of {heads.shape[1]}: patch between inputs of the same length."
            )
        return torch.where(self.chosen[layer].to(heads.device)[:, None], other, heads)
