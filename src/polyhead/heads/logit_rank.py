"""How much of its rank a head uses: the effective rank of its attention logits against tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["effective_rank", "head_rank"]


def effective_rank(matrices: torch.Tensor) -> torch.Tensor:
    """``exp`` of the entropy of singular values that sum to 1 (Roy and Vetterli 2007): ``[...]`` of ``[..., m, n]``.

    It is the rank where all singular values are equal, and less where some are small; 0 for a zero matrix.
    """
    values = torch.linalg.svdvals(matrices.double())
    total = values.sum(-1, keepdim=True)
    shares = values / total.clamp_min(1e-300)
    entropy = -(shares * shares.clamp_min(1e-300).log()).sum(-1)
    return torch.where(total[..., 0] > 0, entropy.exp(), torch.zeros_like(entropy))


@paper("low-rank-bottleneck", "rank-in-attention")
def head_rank(
    model: HeadedModel, texts: Sequence[str | Mapping[str, torch.Tensor]], *, relative: bool = False
) -> HeadMap:
    """Effective rank of every head's logits, mean over texts.

    Logits are read back from the attention weights: ``log w`` is the logits up to a constant a row, which centring
    takes off. Their rank is ``head_dim`` at most (plus that of any bias of positions). A head so sharp on a text that
    weights are zero to rounding is not counted there, and is NaN where that is so on all texts.

    Args:
        model: with bidirectional attention.
        texts: of two tokens or more, each a string or the model's own inputs for it; read one by one, none padded.
        relative: divide by ``min(head_dim, tokens - 1)``, the most there can be.

    Raises:
        InputError: no texts, one of a single token, or a model whose attention is masked.

    Example:
        >>> head_rank(model, ["the river rises in the hills"]).values.shape                    # doctest: +SKIP
        (6, 12)
    """
    if not texts:
        raise InputError("No texts were given; expected at least one to read attention from.")
    found = torch.zeros(model.layers, model.heads, dtype=torch.float64)
    counted = torch.zeros_like(found)
    for text in texts:
        inputs = model.tokenize([text]) if isinstance(text, str) else text
        with model.record("attention") as recording, torch.no_grad():
            model(**inputs)
        weights = recording.attention[0].double()  # [layers, heads, tokens, tokens]
        tokens = weights.shape[-1]
        whole = (weights > 0).flatten(2).all(-1)
        if tokens < 2 or not whole.any():
            raise InputError(
                f"{str(text)[:40]!r} has {tokens} tokens, and in no head do all see each other; expected two tokens or "
                "more, and a model with bidirectional attention over the whole text."
            )
        logits = weights.log().masked_fill(~whole[..., None, None], 0.0)
        ranks = effective_rank(logits - logits.mean(-1, keepdim=True))
        found += ranks / min(model.head_dim, tokens - 1) if relative else ranks
        counted += whole
    name = "relative rank of logits" if relative else "effective rank of logits"
    high = "uses more of the rank that its size allows"
    return HeadMap((found / counted).numpy(), name, model.name, f"{len(texts)} texts", high)
