"""How much each head writes into the residual stream on real texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Progress, Score
from polyhead.model import HeadedModel

__all__ = ["OutputNorm"]


@dataclass
class OutputNorm(Score):
    """Mean over tokens of ``||z_h W_O^h||``, the length of what a head adds (before a norm after the projection).

    As ``sqrt(z_h (W_O^h W_O^h^T) z_h^T)``: a ``head_dim x head_dim`` matrix a head, so that what every head writes,
    ``[batch, tokens, heads, hidden]``, is never held. Cost a token and head: ``2 head_dim^2`` operations instead of ``2
    head_dim hidden``. The output bias belongs to no head and is left out.

    Args:
        batch_size: texts a batch.
        max_tokens: longer texts are cut there.

    Example:
        >>> OutputNorm().score(load("all-MiniLM-L6-v2"), ["What a head writes is what it says."]).top(3)
    """

    name: ClassVar[str] = "output-norm"
    summary: ClassVar[str] = "mean length of what a head writes into the residual stream"
    needs: ClassVar[Any] = "texts"
    higher_means: ClassVar[str] = "writes more into the residual stream"
    batch_size: int = 16
    max_tokens: int = 256

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; ``data`` is a list of texts, None takes 64 of ag-news. Padding does not count.

        Raises:
            InputError: no texts, or something else.
        """
        texts, name = _texts(data)
        total = torch.full((model.layers, model.heads), float("nan"), dtype=torch.float64)
        for at in model.attention_layers:
            total[at.index, : at.heads] = 0
        grams = [_gram(model, at.index) for at in model.attention_layers]
        tokens = 0
        for first in range(0, len(texts), self.batch_size):
            inputs = model.tokenize(texts[first : first + self.batch_size], truncation=True, max_length=self.max_tokens)
            mask = inputs["attention_mask"].bool()
            tokens += int(mask.sum())

            def add(layer: int, z: torch.Tensor, mask: torch.Tensor = mask) -> None:
                lengths = output_norms(z[mask], grams[layer])
                total[layer, : lengths.shape[-1]] += lengths.double().sum(0).cpu()

            with torch.no_grad(), model.tap_heads(add):
                model(**inputs)
            if progress is not None:
                progress(min(first + self.batch_size, len(texts)), len(texts))
        return self._map(total / tokens, model, name)


def output_norms(z: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """``||z_h W_O^h||`` ``[tokens, heads]`` of head outputs ``[tokens, heads, dim]`` and ``gram [heads, dim, dim]``."""
    z = z.to(gram.dtype).transpose(0, 1)
    return ((z @ gram) * z).sum(-1).clamp(min=0).sqrt().T


def _gram(model: HeadedModel, layer: int) -> torch.Tensor:
    weight = model.output_weight(layer).detach().double()
    return (weight @ weight.transpose(1, 2)).float()


def _texts(data: Any) -> tuple[list[str], str]:
    if data is None:
        from polyhead.data import load_texts

        return load_texts("ag-news", 64), "ag-news, 64 texts"
    if isinstance(data, str) or not data or not all(isinstance(text, str) for text in data):
        raise InputError(f"OutputNorm needs a list of texts, got {type(data).__name__}: give at least one string.")
    return list(data), f"{len(data)} texts"
