"""Positional heads: which of a head's rotary pairs, fast or slow, decide what it attends to far away."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from polyhead.data import load_texts
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Progress, Score
from polyhead.heads.logits import stream_query_rows
from polyhead.heads.streaming import check_texts
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["PositionalHeads", "PositionalTable", "rope_decompose"]


@paper("rope-positional-heads")
def rope_decompose(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float = 1.0, layout: Literal["halves", "interleaved"] = "halves"
) -> torch.Tensor:
    """Attention logits as a sum over rotary pairs, ``[heads, pairs, rows, keys]``; over pairs they sum to the logits.

    Pair ``i`` of a head gives ``(q_i k_i + q_i' k_i') * scaling``, with queries and keys as they are after the
    rotation, which happens inside each pair.

    Args:
        queries: ``[heads, rows, head_dim]``, rotated.
        keys: ``[heads, keys, head_dim]``, rotated.
        scaling: of the logits.
        layout: which dimensions are a pair: ``i`` and ``i + head_dim / 2`` ("halves": Llama, Gemma, Qwen) or ``2i``
            and ``2i + 1`` ("interleaved": GPT-J, Cohere).
    """
    size = (2, -1) if layout == "halves" else (-1, 2)
    first = queries.unflatten(-1, size) * scaling
    second = keys.unflatten(-1, size)
    equation = "hrcp,hkcp->hprk" if layout == "halves" else "hrpc,hkpc->hprk"
    return torch.einsum(equation, first, second)


@dataclass(frozen=True)
class PositionalTable:
    """How each rotary pair goes with far attention.

    Attributes:
        correlation: ``[layers, heads, pairs]``, fastest pair first; NaN where a layer sees nothing that far.
        far: ``[layers, heads]``: share of the attention that goes further than ``min_distance``.
        texts: how many were long enough.
        model: name.
    """

    correlation: np.ndarray
    far: np.ndarray
    texts: int
    model: str


@paper("rope-positional-heads")
@dataclass
class PositionalHeads(Score):
    """Mean correlation of a head's slow rotary pairs with its logits to distant tokens (rope-positional-heads).

    For sampled queries, and all keys further than ``min_distance`` away, the contribution of each pair
    (:func:`rope_decompose`) is correlated with the whole logit; both are centred within each query, since a shift of
    a query's logits changes no attention. The score is the mean over the slower half of the pairs. (The paper's
    own formula could not be checked; this is the definition here.)

    Args:
        min_distance: what counts as distant, in tokens; layers with a shorter sliding window have no value.
        rows: queries a text, evenly spaced over those with at least two distant keys.
        max_tokens: texts are cut there.
        layout: see :func:`rope_decompose`.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("gemma-3-270m")
        >>> table = PositionalHeads(min_distance=64).measure(model, [" ".join(load_texts("ag-news", 8))])
        >>> table.correlation.shape
        (18, 4, 128)
    """

    name: ClassVar[str] = "rope-positional-heads"
    summary: ClassVar[str] = "how far a head's slow rotary pairs decide what it attends to at a distance"
    needs: ClassVar[Any] = "texts"
    higher_means: ClassVar[str] = "is led at long range by its slow rotary pairs"

    min_distance: int = 64
    rows: int = 16
    max_tokens: int = 1024
    layout: Literal["halves", "interleaved"] = "halves"

    def score(
        self, model: HeadedModel, data: Sequence[str] | None = None, *, progress: Progress | None = None
    ) -> HeadMap:
        """See :class:`Score`; without data, four texts of 16 news items each."""
        if data is None:
            items = load_texts("ag-news", 64)
            data = ["\n".join(items[first : first + 16]) for first in range(0, 64, 16)]
        table = self.measure(model, data, progress=progress)
        slow = table.correlation[..., table.correlation.shape[-1] // 2 :]
        return self._map(slow.mean(-1), model, f"{table.texts} texts, distance over {self.min_distance}")

    def measure(self, model: HeadedModel, data: Sequence[str], *, progress: Progress | None = None) -> PositionalTable:
        """The whole table.

        Raises:
            InputError: a model without rotary positions in all of each head, or no text of enough tokens.
        """
        texts = check_texts(data, "PositionalHeads")
        _check_rotary(model)
        shape = (model.layers, model.heads, model.head_dim // 2)
        products, squares = np.zeros(shape), np.zeros(shape)
        whole, far, seen = np.zeros(shape[:2]), np.zeros(shape[:2]), np.zeros(shape[:2])
        used = 0
        for done, text in enumerate(texts, start=1):
            ids = model.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
            first = self.min_distance + 2
            if len(ids) > first:
                rows = torch.linspace(first, len(ids) - 1, min(self.rows, len(ids) - first)).long()

                def visit(
                    layer: int, queries: torch.Tensor, keys: torch.Tensor, scaling: float, rows: torch.Tensor = rows
                ) -> None:
                    window = model.attention_layers[layer].sliding_window
                    sums = self._sums(queries, keys, scaling, rows, window)
                    heads = queries.shape[0]
                    for total, part in zip((products, squares, whole, far), sums, strict=True):
                        total[layer, :heads] += part.cpu().numpy()
                    seen[layer, :heads] += len(rows)

                stream_query_rows(model, ids, rows, visit)
                used += 1
            if progress is not None:
                progress(done, len(texts))
        if not used:
            raise InputError(
                f"None of the {len(texts)} texts has more than {self.min_distance + 2} tokens, so nothing is further "
                f"than {self.min_distance} away: give longer texts or a smaller min_distance."
            )
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation = products / np.sqrt(squares * whole[..., None])
            return PositionalTable(correlation, far / seen, used, model.name)

    def _sums(
        self, queries: torch.Tensor, keys: torch.Tensor, scaling: float, rows: torch.Tensor, window: int | None
    ) -> tuple[torch.Tensor, ...]:
        """Over rows: pair times logit, pair squared ``[heads, pairs]``; logit squared, far mass ``[heads]``."""
        totals: list[torch.Tensor] = []
        for at, row in enumerate(rows.tolist()):
            start = 0 if window is None else max(0, row - window + 1)
            end = row - self.min_distance  # keys start .. end - 1 are further than min_distance
            logits = (queries[:, at, None] @ keys[:, start : row + 1].transpose(1, 2))[:, 0].double() * scaling
            mass = torch.softmax(logits, -1)[:, : max(0, end - start)].sum(-1)
            if end - start < 2:
                heads, pairs = queries.shape[0], queries.shape[-1] // 2
                zero = queries.new_zeros(heads, pairs, dtype=torch.float64)
                parts = [zero, zero, zero[:, 0], mass]
            else:
                pair = rope_decompose(queries[:, at, None], keys[:, start:end], scaling, self.layout)[:, :, 0].double()
                pair = pair - pair.mean(-1, keepdim=True)
                logit = pair.sum(1)
                parts = [(pair * logit[:, None]).sum(-1), (pair**2).sum(-1), (logit**2).sum(-1), mass]
            totals = parts if not totals else [a + b for a, b in zip(totals, parts, strict=True)]
        return tuple(totals)


def _check_rotary(model: HeadedModel) -> None:
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if not rope and getattr(config, "rope_theta", None) is None:
        raise InputError(f"'{model.name}' has no rotary positions; expected a model such as Llama, Qwen or Gemma.")
    kinds = [one for one in rope.values() if isinstance(one, dict)] or [rope]
    partial = [one.get("partial_rotary_factor", 1.0) for one in kinds]
    if any(factor not in (None, 1.0) for factor in partial):
        raise InputError(
            f"'{model.name}' rotates only {partial[0]:g} of each head; expected one that rotates all of it."
        )
