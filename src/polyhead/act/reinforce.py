"""VHR: reinforce the heads that respond to a context."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from polyhead.act.base import HeadAction
from polyhead.act.gate import Gate
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel
    from polyhead.recording import Recording

__all__ = ["Reinforce", "responsive_heads"]


@paper("vhd-vhr")
def responsive_heads(divergence: torch.Tensor) -> torch.Tensor:
    """Heads above their layer's median that are no outliers: boolean, of divergences ``[..., heads]``.

    An outlier lies above the layer's mean plus one standard deviation. Medians and means are over all the heads.
    """
    outlier = divergence > divergence.mean(-1, keepdim=True) + divergence.std(-1, keepdim=True, unbiased=False)
    return (divergence > divergence.quantile(0.5, dim=-1, keepdim=True)) & ~outlier


@paper("vhd-vhr")
class Reinforce(HeadAction):
    """Heads whose output changes with the context are multiplied by ``alpha``, chosen anew in every forward pass.

    In each layer, at each row's last token, the distance between a head's output now and its output without the
    context decides (:func:`responsive_heads`); the next layer sees the reinforced state. For a fixed choice of heads
    use :meth:`from_map`.

    Args:
        without: a :class:`Recording` of "heads" from the run without the context, same rows; its last token is used.
        alpha: factor; 1 changes nothing.

    Example:
        >>> import polyhead, torch
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> with model.record("heads") as without, torch.no_grad():
        ...     _ = model(**model.tokenize(["What does the guide say?"]))
        >>> with Reinforce(without, alpha=1.5).on(model), torch.no_grad():
        ...     _ = model(**model.tokenize(["The guide says left. What does the guide say?"]))
    """

    name: ClassVar[str] = "reinforce"
    summary: ClassVar[str] = "multiply heads that respond to the context"

    def __init__(self, without: Recording | torch.Tensor, alpha: float = 2.0) -> None:
        given = without if isinstance(without, torch.Tensor) else without.heads
        if given.dim() != 5:
            raise InputError(
                f"The run without context has the shape {list(given.shape)}, expected head outputs [batch, layers, "
                "heads, tokens, head_dim] as model.record('heads') gives them."
            )
        self.without, self.alpha = given[:, :, :, -1], alpha

    @classmethod
    def from_map(cls, divergence: HeadMap, alpha: float = 2.0) -> Gate:
        """Fixed gates by a measured divergence: ``alpha`` for responsive heads, 1 for the others."""
        chosen = responsive_heads(torch.as_tensor(divergence.values))
        return Gate(torch.where(chosen, alpha, 1.0))

    def check(self, model: HeadedModel) -> None:
        """See :class:`HeadAction`."""
        shape, expected = list(self.without.shape[1:3]), [model.layers, model.heads]
        if shape != expected:
            raise InputError(f"{shape} layers and heads were recorded without context, '{model.name}' has {expected}.")

    def divergence(self, layer: int, heads: torch.Tensor) -> torch.Tensor:
        """What decides: ``[batch, heads]``, distance of the last token's outputs from those without the context."""
        return (heads[:, -1].float() - self.without[:, layer].to(heads.device).float()).norm(dim=-1).detach()

    def change(self, layer: int, heads: torch.Tensor) -> torch.Tensor | None:
        """See :class:`HeadAction`."""
        if self.alpha == 1:
            return None
        factor = torch.where(responsive_heads(self.divergence(layer, heads)), self.alpha, 1.0).to(heads.dtype)
        return torch.cat([heads[:, :-1], heads[:, -1:] * factor[:, None, :, None]], dim=1)
