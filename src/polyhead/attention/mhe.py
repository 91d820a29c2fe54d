"""Head embeddings: one projection for all heads, told apart by a vector each."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import nn

from polyhead.attention.base import Attention, LayerMatrices, Positions, Triple, shape_of
from polyhead.attention.call import AttentionShape
from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["HeadEmbeddingAttention"]

_ROLES = ("query", "key", "value")


@paper("mhe-head-embeddings")
class HeadEmbeddingAttention(Attention):
    """Queries, keys and values of head ``i`` are ``X W + e_i`` or ``X W * (1 + e_i)`` with one ``W`` a role.

    Args:
        shape: widths; with ``kv_heads`` keys and values have that many embeddings.
        causal: whether a token sees only itself and what stands before it.
        positions: tells queries and keys where they stand.
        mode: "mul" (the paper's better one), "add", or "both": ``X W * (1 + e_i) + f_i``.
        spread: standard deviation the embeddings start with.

    Raises:
        InputError: another mode.

    Source:
        mhe-head-embeddings (Xue and Aletras 2023).

    Example:
        >>> layer = HeadEmbeddingAttention(AttentionShape(64, 8))
        >>> whole = Attention(AttentionShape(64, 8))
        >>> [sum(each.numel() for each in one.parameters()) for one in (layer, whole)]
        [5824, 16384]
    """

    name: ClassVar[str] = "mhe-head-embeddings"
    summary: ClassVar[str] = "One projection for all heads, a learned vector a head"

    def __init__(
        self,
        shape: AttentionShape,
        *,
        causal: bool = False,
        positions: Positions | None = None,
        mode: Literal["add", "mul", "both"] = "mul",
        spread: float = 0.1,
    ) -> None:
        if mode not in ("add", "mul", "both"):
            raise InputError(f"mode={mode!r} was given; expected 'add', 'mul' or 'both'.")
        super().__init__(shape, causal=causal, positions=positions)
        self.mode = mode
        counts = dict(zip(_ROLES, (shape.heads, shape.groups_of, shape.groups_of), strict=True))
        kinds = ("mul", "add") if mode == "both" else (mode,)
        self.embeddings = nn.ParameterDict(
            {f"{role}_{kind}": spread * torch.randn(counts[role], 1, shape.size) for role in _ROLES for kind in kinds}
        )

    def make_projections(self, shape: AttentionShape) -> None:
        """One head's projections, and the output of all."""
        self.q_proj = nn.Linear(shape.dim, shape.size, bias=shape.bias)
        self.k_proj = nn.Linear(shape.dim, shape.size, bias=shape.bias)
        self.v_proj = nn.Linear(shape.dim, shape.size, bias=shape.bias)
        self.o_proj = nn.Linear(shape.width, shape.dim, bias=shape.bias)

    def project(self, hidden: torch.Tensor) -> Triple:
        """The shared projections, then every head's own embedding."""
        q, k, v = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        return self._told("query", q), self._told("key", k), self._told("value", v)

    @classmethod
    def from_mha(cls, layer: LayerMatrices, *, mode: Literal["add", "mul"] = "mul", **knobs: Any) -> Attention:
        """The nearest layer of this form to a trained one in least squares, as a start for training.

        "mul": column by column, the heads' weights as a rank-1 product; "add": the heads' mean, and their biases.

        Args:
            layer: the trained layer.
            mode: "mul" or "add".
            knobs: ``causal`` and ``positions``.
        """
        made = cls(shape_of(layer), mode=mode, **knobs)
        pairs = ((layer.query, layer.query_bias), (layer.key, layer.key_bias), (layer.value, layer.value_bias))
        for role, (matrix, bias) in zip(_ROLES, pairs, strict=True):
            linear: nn.Linear = getattr(made, f"{role[0]}_proj")
            if mode == "add":
                shared, own = matrix.mean(0), bias
                linear.bias.data.zero_()
            else:
                columns = torch.cat([matrix, bias[:, None]], 1).permute(2, 1, 0)
                left, size, right = torch.linalg.svd(columns, full_matrices=False)
                facing = right[:, 0].mean(1)
                unit = torch.where(facing.abs() < 1e-6, torch.ones_like(facing), facing)
                found = (left[..., 0] * (size[:, :1] * unit[:, None])).T
                shared, own = found[:-1], (right[:, 0] / unit[:, None]).T - 1
                linear.bias.data.copy_(found[-1])
            linear.weight.data.copy_(shared.T)
            made.embeddings[f"{role}_{mode}"].data.copy_(own[:, None])
        made.o_proj.weight.data.copy_(layer.output.flatten(0, 1).T)
        made.o_proj.bias.data.copy_(layer.output_bias)
        return made

    def _told(self, role: str, states: torch.Tensor) -> torch.Tensor:
        told = states[:, None]
        if self.mode != "add":
            told = told * (1 + self.embeddings[f"{role}_mul"])
        return told if self.mode == "mul" else told + self.embeddings[f"{role}_add"]
