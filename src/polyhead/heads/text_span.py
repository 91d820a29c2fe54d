"""TextSpan: texts that name what a head adds to an embedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from polyhead.errors import InputError
from polyhead.papers import paper

__all__ = ["TextSpan", "text_span"]


@dataclass(frozen=True)
class TextSpan:
    """Texts that explain a head's outputs.

    Attributes:
        texts: ``[k]``, rows of the candidates in the order they were picked.
        explained: ``[k]``, share of the outputs' variance that the texts up to each explain.
    """

    texts: torch.Tensor
    explained: torch.Tensor


@paper("clip-text-decomposition")
def text_span(outputs: torch.Tensor, candidates: torch.Tensor, k: int) -> TextSpan:
    """TextSpan: the candidate directions that hold most of a head's variance (clip-text-decomposition, algorithm 1).

    The mean output is taken off, candidates are projected onto the space the outputs span; then the one with the most
    variance ``sum_n <output_n, candidate>^2`` is picked and projected out of outputs and candidates, again and again.

    Args:
        outputs: ``[samples, dim]``, a head's parts of the vectors, ``parts.heads[:, layer, head]``.
        candidates: ``[texts, dim]``, embeddings of candidate texts in the same space.
        k: how many; fewer are given where fewer explain all.

    Raises:
        InputError: shapes that do not fit together, or no texts asked for.

    Example:
        >>> import torch
        >>> outputs = torch.tensor([[2.0, 0.0, 0.0], [-2.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
        >>> text_span(outputs, torch.eye(3), 2).texts.tolist()
        [0, 1]
    """
    if outputs.dim() != 2 or candidates.dim() != 2 or outputs.shape[1] != candidates.shape[1] or k < 1:
        raise InputError(
            f"text_span was given outputs {list(outputs.shape)}, candidates {list(candidates.shape)} and k={k}; "
            "expected [samples, dim], [texts, dim] and k of 1 or more."
        )
    centred = outputs.double() - outputs.double().mean(0)
    _, singular, space = torch.linalg.svd(centred, full_matrices=False)
    space = space[singular > singular[0] * 1e-6]  # outputs of one head have the rank of its head_dim
    spread = space @ (centred.T @ centred) @ space.T
    texts = candidates.double() @ space.T
    whole = spread.trace()
    picked: list[int] = []
    explained: list[float] = []
    while len(picked) < k and bool(spread.trace() > whole * 1e-10):
        variance = ((texts @ spread) * texts).sum(1)
        best = int(variance.argmax())
        if not bool(variance[best] > 0):
            break
        direction = texts[best] / texts[best].norm()
        away = torch.eye(len(spread), dtype=spread.dtype, device=spread.device) - direction[:, None] * direction
        spread, texts = away @ spread @ away, texts @ away
        texts[best] = 0
        picked.append(best)
        explained.append(float(1 - spread.trace() / whole))
    return TextSpan(torch.tensor(picked, dtype=torch.long), torch.tensor(explained, dtype=torch.float64))
