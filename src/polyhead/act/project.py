"""Take chosen directions out of head outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from polyhead.act.base import HeadAction
from polyhead.act.vectors import Heads, head_mask
from polyhead.errors import InputError

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["ProjectOut"]


class ProjectOut(HeadAction):
    """Remove from each head's output what lies in the span of given directions: ``z_h <- z_h - z_h B_h B_h^T``.

    The edit of single directions that head-pursuit's concept dictionaries call for; scaling whole heads (its own
    intervention, -1 or 5) is :class:`Gate`.

    Args:
        directions: ``[layers, heads, k, head_dim]`` in head space; zero vectors stand for none.
        heads: which heads; None for all.
        strength: 1 removes the directions, 2 mirrors the output at them, 0 leaves it.

    Example:
        >>> import polyhead, torch
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> directions = torch.randn(2, model.hidden_size)
        >>> action = ProjectOut.from_hidden(model, directions, heads=[(5, 3)])
        >>> with action.on(model), model.record("heads") as recording, torch.no_grad():
        ...     _ = model(**model.tokenize(["no word of this"]))
    """

    name: ClassVar[str] = "project-out"
    summary: ClassVar[str] = "remove directions from a head's output"

    def __init__(self, directions: np.ndarray | torch.Tensor, heads: Heads = None, strength: float = 1.0) -> None:
        given = torch.as_tensor(directions)
        if given.dim() != 4:
            raise InputError(
                f"Directions have the shape {list(given.shape)}, expected [layers, heads, k, head_dim]; "
                "ProjectOut.from_hidden takes directions [k, hidden]."
            )
        self.chosen = head_mask(heads, *given.shape[:2])
        self.strength = strength
        # Right singular vectors of the given rows: an orthonormal basis of their span, dependent rows included.
        _, singular, basis = torch.linalg.svd(given.double(), full_matrices=False)
        tolerance = singular.amax(-1, keepdim=True) * max(given.shape[-2:]) * torch.finfo(torch.float32).eps
        self.basis = basis * (singular > tolerance)[..., None]

    @classmethod
    def from_hidden(
        cls, model: HeadedModel, directions: torch.Tensor, heads: Heads = None, strength: float = 1.0
    ) -> ProjectOut:
        """Directions of the residual stream: afterwards no chosen head writes along any of them.

        A head writes ``z_h W_O[h]``, so in head space a direction ``d`` is ``W_O[h] d``. Where a model normalises the
        attention output before adding it (Gemma 2 and 3), this holds before that norm.

        Args:
            model: whose output projections are used.
            directions: ``[k, hidden]``, for example rows of the unembedding.
            heads, strength: as in the class.
        """
        if directions.dim() != 2 or directions.shape[1] != model.hidden_size:
            raise InputError(
                f"Directions have the shape {list(directions.shape)}, expected [k, {model.hidden_size}] for "
                f"'{model.name}'."
            )
        inside = torch.zeros(model.layers, model.heads, len(directions), model.head_dim, dtype=torch.float64)
        for layer in range(model.layers):
            with torch.no_grad():
                weight = model.output_weight(layer).double().cpu()
                found = torch.einsum("hdm,km->hkd", weight, directions.double().cpu())
            inside[layer, : found.shape[0], :, : found.shape[2]] = found
        return cls(inside, heads, strength)

    def check(self, model: HeadedModel) -> None:
        """See :class:`HeadAction`."""
        layers, heads, _, width = self.basis.shape
        if (layers, heads, width) != (model.layers, model.heads, model.head_dim):
            raise InputError(
                f"The directions are for {layers} layers x {heads} heads of {width}; '{model.name}' has "
                f"{model.layers} x {model.heads} of {model.head_dim}."
            )

    def change(self, layer: int, heads: torch.Tensor) -> torch.Tensor | None:
        """See :class:`HeadAction`."""
        chosen = self.chosen[layer, : heads.shape[-2]]
        if not bool(chosen.any()) or self.strength == 0:
            return None
        basis = self.basis[layer, : heads.shape[-2], :, : heads.shape[-1]].to(heads.device, torch.float32)
        inside = torch.einsum("...hd,hkd->...hk", heads.float(), basis)
        along = torch.einsum("...hk,hkd->...hd", inside, basis * chosen.to(heads.device)[:, None, None])
        return (heads.float() - self.strength * along).to(heads.dtype)
