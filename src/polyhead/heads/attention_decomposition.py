"""An attention logit in the singular basis of its query-key matrix, where few terms carry it.

With homogeneous vectors ``d~ = (d, 1)`` and ``s~ = (s, 1)`` of what a layer's projections are given at the destination
(query) and the source (key), a head's logit is bilinear, biases included:

    logit = d~ Omega s~^T,    Omega = scaling * W~_Q W~_K^T = U S V^T,    logit = sum_k  S_k (d~ . u_k)(v_k . s~)

Rotary positions stand between the two: ``Omega = scaling * W~_Q R_i R_j^T W~_K^T`` is then a matrix a distance. A
query-key norm divides each query and key by its own size: these two factors are read from the pass and held fixed
(paper sparse-attention-decomposition).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.heads._reading import LayerReading, read_layers
from polyhead.heads.base import Needs, Progress, Score
from polyhead.heads.weights import ModelWeights, read_weights
from polyhead.papers import paper
from polyhead.structure import probe_inputs

if TYPE_CHECKING:
    from polyhead.headmap import HeadMap
    from polyhead.model import HeadedModel

__all__ = ["LogitSVD", "LogitSparsity", "PairTerms", "pair_terms", "sparsity_curve", "terms_needed"]


@paper("sparse-attention-decomposition")
class LogitSVD:
    """The singular value decomposition of one head's query-key matrix, biases folded in by a coordinate that is 1.

    Attributes:
        left: ``[hidden + 1, dim]`` orthonormal directions ``u_k`` that the destination is read along.
        sizes: ``[dim]`` singular values, largest first; scaling included.
        right: ``[hidden + 1, dim]`` orthonormal directions ``v_k`` that the source is read along.

    Args:
        model: any whose attention goes through transformers' interface.
        layer, head: which.
        distance: destination position less source position; it matters under rotary positions only.

    Raises:
        InputError: no such head, or queries or keys that are no rotated projections.

    Example:
        >>> import polyhead, torch
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> svd = LogitSVD(model, layer=2, head=9)
        >>> d, s = torch.randn(2, 384)
        >>> svd.terms(d, s).shape, bool((svd.terms(d, s).sum() - svd.logit(d, s)).abs() < 1e-9)
        (torch.Size([32]), True)
    """

    def __init__(self, model: HeadedModel, layer: int, head: int, *, distance: int = 0) -> None:
        if not (0 <= layer < model.layers and 0 <= head < model.attention_layers[layer].heads):
            raise InputError(
                f"Layer {layer}, head {head} was asked for; '{model.name}' has {model.layers} layers x {model.heads} "
                "heads."
            )
        weights = read_weights(model, fold=False, dtype=torch.float64)
        inputs = probe_inputs(model.module)
        if "input_ids" in inputs:
            inputs = {"input_ids": inputs["input_ids"].repeat(1, 1 + abs(distance) // inputs["input_ids"].shape[1])}
        reading = next(read_layers(model, inputs, weights, layers=[layer]))
        pair = (max(distance, 0), max(-distance, 0))
        self.left, self.sizes, self.right = reading.svd(0, head, *(place % reading.tokens for place in pair))

    @classmethod
    def at(cls, reading: LayerReading, row: int, head: int, destination: int, source: int) -> LogitSVD:
        """Of one pair of tokens in a pass that was read."""
        made = cls.__new__(cls)
        made.left, made.sizes, made.right = reading.svd(row, head, destination, source)
        return made

    def terms(self, d: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """``S_k (d~ . u_k)(v_k . s~)``, ``[..., dim]`` float64, of vectors ``[..., hidden]`` before the projections."""
        return self.sizes * (_homogeneous(d) @ self.left) * (_homogeneous(s) @ self.right)

    def logit(self, d: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The whole logit ``[...]``, by the matrix itself; query-key norms, which are of the pass, are not in it."""
        matrix = (self.left * self.sizes) @ self.right.T
        return ((_homogeneous(d) @ matrix) * _homogeneous(s)).sum(-1)


def terms_needed(terms: torch.Tensor, share: float = 1.0) -> torch.Tensor:
    """How many of the largest terms reach ``share`` of their sum, ``[...]`` of ``[..., dim]``; NaN where it is <= 0."""
    if not 0 < share <= 1:
        raise InputError(f"share={share} was given, expected more than 0 and at most 1.")
    total = terms.double().sum(-1, keepdim=True)
    reached = terms.double().sort(dim=-1, descending=True).values.cumsum(-1)
    # Rounding must not ask for terms of nothing where the whole logit is wanted.
    needed = (reached < share * total - 1e-9 * reached.amax(-1, keepdim=True)).sum(-1).double() + 1
    return torch.where(total[..., 0] > 0, needed, torch.nan)


def sparsity_curve(terms: torch.Tensor) -> torch.Tensor:
    """Share of the logit that the 1, 2, ... largest terms make up, ``[..., dim]``; above 1 where later ones oppose."""
    ordered = terms.double().sort(dim=-1, descending=True).values
    return ordered.cumsum(-1) / terms.double().sum(-1, keepdim=True)


@dataclass(frozen=True)
class PairTerms:
    """One head's firings in one batch.

    Attributes:
        layer, head: which.
        pairs: ``[firings, 3]`` row, destination and source.
        terms: ``[firings, dim]`` in the singular basis, float64; they sum to the logits.
        left, right: ``[firings, dim]`` with ``terms = left * right``: ``d~ . u_k`` and ``S_k v_k . s~``.
    """

    layer: int
    head: int
    pairs: np.ndarray
    terms: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


def pair_terms(
    model: HeadedModel,
    inputs: dict[str, torch.Tensor],
    *,
    threshold: float = 0.5,
    weights: ModelWeights | None = None,
    most: int = 64,
) -> Iterator[PairTerms]:
    """Every head's firings, pairs of real tokens with attention above ``threshold``, and their terms; layer by layer.

    Args:
        model: any whose attention goes through transformers' interface.
        inputs: a batch; padding is left out.
        threshold: of attention weights.
        weights: of ``read_weights(model, fold=False, dtype=torch.float64)``; read here where None.
        most: firings of one head and batch under rotary positions, where each distance has a decomposition of its
            own: evenly spread ones are taken where there are more.
    """
    weights = read_weights(model, fold=False, dtype=torch.float64) if weights is None else weights
    for reading in read_layers(model, inputs, weights):
        fired = reading.attention > threshold
        mask = inputs.get("attention_mask")
        if mask is not None:
            real = mask.bool().to(fired.device)
            fired &= real[:, None, :, None] & real[:, None, None, :]
        for head in range(reading.heads):
            pairs = fired[:, head].nonzero().cpu().numpy()
            if reading.turns is not None and len(pairs) > most:
                pairs = pairs[np.linspace(0, len(pairs) - 1, most).round().astype(int)]
            left, right = reading.factors(head, pairs)
            yield PairTerms(reading.layer, head, pairs, left * right, left, right)


@paper("sparse-attention-decomposition")
@dataclass
class LogitSparsity(Score):
    """How few singular terms carry a head's logits where it fires: 1 less the mean share of terms that are needed.

    1 - 1/dim: one term of the ``dim`` does it. NaN where a head never fires. Cost: a pass a batch with the attention of
    one layer at a time, one decomposition a head; under rotary positions one a head and distance that occurs.

    Args:
        threshold: a firing is a pair of tokens with more attention than this.
        share: of the logit that the largest terms are to reach; firings of a negative logit are left out.
        max_tokens: texts are cut there.
        batch_size: texts a batch.
        most: firings a head and batch, under rotary positions.

    Example:
        >>> import polyhead
        >>> LogitSparsity().score(polyhead.load("all-MiniLM-L6-v2"), ["A man is playing a guitar."]).shape
        (6, 12)
    """

    threshold: float = 0.5
    share: float = 0.9
    max_tokens: int = 64
    batch_size: int = 8
    most: int = 64

    name: ClassVar[str] = "logit-sparsity"
    summary: ClassVar[str] = "how few singular terms of its query-key matrix carry a head's logits where it fires"
    needs: ClassVar[Needs] = "texts"
    higher_means: ClassVar[str] = "fewer terms carry the logit"

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; data is a list of texts."""
        from polyhead.data import load_texts

        texts = load_texts("ag-news", 64) if data is None else data
        if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
            raise InputError(f"'{self.name}' was given {type(data).__name__}; expected a list of texts.")
        batches = [texts[first : first + self.batch_size] for first in range(0, len(texts), self.batch_size)]
        tokenized = (model.tokenize(batch, truncation=True, max_length=self.max_tokens) for batch in batches)
        values = self.sparsity(model, tokenized, progress=progress, total=len(batches))
        return self._map(values, model, f"{len(texts)} texts")

    def sparsity(
        self,
        model: HeadedModel,
        batches: Any,
        *,
        progress: Progress | None = None,
        total: int | None = None,
    ) -> np.ndarray:
        """The same of batches of inputs, ``[layers, heads]``."""
        if not 0 < self.threshold < 1:
            raise InputError(f"threshold={self.threshold} was given, expected a value between 0 and 1.")
        weights = read_weights(model, fold=False, dtype=torch.float64)
        shares, counts = np.zeros((model.layers, model.heads)), np.zeros((model.layers, model.heads))
        for done, inputs in enumerate(batches, start=1):
            for found in pair_terms(model, inputs, threshold=self.threshold, weights=weights, most=self.most):
                needed = terms_needed(found.terms, self.share)
                needed = needed[needed.isfinite()]
                shares[found.layer, found.head] += float(needed.sum()) / found.terms.shape[-1]
                counts[found.layer, found.head] += len(needed)
            if progress is not None:
                progress(done, total)
        return np.where(counts > 0, 1 - shares / np.maximum(counts, 1), np.nan)


def _homogeneous(vectors: torch.Tensor) -> torch.Tensor:
    wide = vectors.double()
    return torch.cat([wide, torch.ones_like(wide[..., :1])], -1)
