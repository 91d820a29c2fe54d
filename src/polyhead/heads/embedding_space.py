"""All weights read in the vocabulary: what feed-forward memories stand for, and which tokens a head connects.

With ``E`` the token embedding, a head's value-output matrix is the token-by-token table ``E W_V W_O E^T`` and its
query-key matrix ``E W_Q W_K^T E^T``; a row of a feed-forward layer is one vector over the vocabulary. No text is run
and no table is ever made: tables are products of two thin factors, whose largest entries are found block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads._feedforward import FeedForward, find_feedforward
from polyhead.heads._probe import Probe
from polyhead.heads.base import Progress, Score
from polyhead.heads.weights import read_weights
from polyhead.model import HeadedModel
from polyhead.papers import paper

__all__ = ["EmbeddingSpace", "MemoryReading", "OVSharpness", "TokenPairs", "top_entries"]

Ids = Sequence[int] | torch.Tensor | None


@dataclass(frozen=True)
class TokenPairs:
    """The largest entries of a head's token-by-token table, largest first.

    Attributes:
        kind: "OV" (source token, token it promotes) or "QK" (query token, key token).
        values: ``[k]``.
        sources, targets: ``[k]`` token ids.
        rms: root mean square of all entries of the table searched: what an ordinary entry is.
        inexact: what the table does not say exactly of the model; empty where it says it all.
    """

    kind: Literal["OV", "QK"]
    values: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    rms: float
    inexact: str

    @property
    def sharpness(self) -> float:
        """Mean of these entries over the table's root mean square."""
        return float(self.values.double().mean()) / self.rms if self.rms > 0 else 0.0

    def words(self, tokenizer: Any) -> list[tuple[str, str]]:
        """The pairs as text."""
        both = zip(self.sources.tolist(), self.targets.tolist(), strict=True)
        return [(tokenizer.decode([first]), tokenizer.decode([second])) for first, second in both]


@dataclass(frozen=True)
class MemoryReading:
    """One feed-forward memory in the vocabulary: tokens of the largest entries, with the entries, largest first.

    Attributes:
        key: of ``K E^T``: tokens that wake the memory.
        up: of the linear factor of a gated layer, else None.
        value: of ``V E^T``: tokens it promotes.
    """

    key: list[tuple[int, float]]
    up: list[tuple[int, float]] | None
    value: list[tuple[int, float]]


@paper("embedding-space-transformers")
class EmbeddingSpace:
    """A model's parameters in the space of its tokens (Analyzing Transformers in Embedding Space, section 3).

    What is read from the stream is compared with the rows of the embedding; what is written with the unembedding (after
    the final norm's gain), or with the embedding where the model has none (BERT), ``E^T`` standing for its inverse.
    Gains of the norms around are folded in; their division by each state's size, and biases, are left out.

    Args:
        model: any text model whose embedding is as wide as its stream.

    Raises:
        InputError: no token embedding, or one of another width (ALBERT, ELECTRA with a projection).

    Example:
        >>> space = EmbeddingSpace(load("all-MiniLM-L6-v2"))
        >>> pairs = space.ov_pairs(layer=5, head=3, k=10)
        >>> reading = space.ffn(layer=5, index=17, k=5)
        >>> len(pairs.values), len(reading.value)
        (10, 5)
    """

    def __init__(self, model: HeadedModel) -> None:
        self.model = model
        self.weights = read_weights(model)
        embedding = self.weights.embedding
        if embedding is None or embedding.shape[1] != self.weights.hidden:
            width = "none" if embedding is None else f"one of width {embedding.shape[1]}"
            raise InputError(
                f"'{model.name}' cannot be read in embedding space: expected a token embedding as wide as its stream "
                f"({self.weights.hidden}), it has {width}."
            )
        self.embedding: torch.Tensor = embedding
        self._layers = [layer.expanded() for layer in self.weights.layers]
        self._feedforward: tuple[FeedForward, ...] | None = None
        self._probe: Probe | None = None

    @property
    def feedforward(self) -> tuple[FeedForward, ...]:
        """The feed-forward layers by role."""
        if self._feedforward is None:
            self._feedforward = find_feedforward(self.model)
        return self._feedforward

    def read(self, rows: torch.Tensor, tokens: Ids = None) -> torch.Tensor:
        """``rows E^T``: vectors ``[..., hidden]`` that the stream is compared with, as ``[..., vocabulary]``."""
        return rows @ self.source_rows(tokens).to(rows.dtype).T

    def written(self, rows: torch.Tensor, tokens: Ids = None) -> torch.Tensor:
        """Vectors ``[..., hidden]`` that are added to the stream, as logits ``[..., vocabulary]``."""
        return self.before_target(rows) @ self.target_rows(tokens).to(rows.dtype).T

    def source_rows(self, tokens: Ids = None) -> torch.Tensor:
        """Rows of the embedding, ``[tokens, hidden]``."""
        return self._rows(self.embedding, tokens)

    def target_rows(self, tokens: Ids = None) -> torch.Tensor:
        """Rows that what is written is compared with: of the unembedding where there is one, else of the embedding."""
        unembedding = self.weights.unembedding
        return self._rows(self.embedding if unembedding is None else unembedding, tokens)

    def before_target(self, rows: torch.Tensor) -> torch.Tensor:
        """Written vectors as :meth:`target_rows` sees them: through the final norm, up to its division by the size."""
        return rows if self.weights.unembedding is None else self.weights.before_unembedding(rows)

    def ffn(self, layer: int, index: int, k: int = 10) -> MemoryReading:
        """One memory's key, linear factor (gated layers) and value as their top ``k`` tokens."""
        at = self._at(layer)
        if not 0 <= index < at.memories:
            raise InputError(f"Memory {index} was asked for; layer {layer} has memories 0 to {at.memories - 1}.")
        with torch.no_grad():
            ups = at.ups()
            return MemoryReading(
                key=_top(self.read(at.keys()[index]), k),
                up=None if ups is None else _top(self.read(ups[index]), k),
                value=_top(self.written(at.values()[index]), k),
            )

    def ov_pairs(self, layer: int, head: int, k: int = 50, *, sources: Ids = None, targets: Ids = None) -> TokenPairs:
        """The ``k`` largest entries of ``E W_V W_O E^T``: a head that attends to the source promotes the target.

        Args:
            layer, head: of the model.
            k: how many.
            sources, targets: token ids to search; None for the whole vocabulary, in which the cost is
                ``2 vocabulary^2 head_dim`` operations (MiniLM seconds, Gemma's 262,144 tokens many minutes).
        """
        at = self._head(layer, head)
        with torch.no_grad():
            left = self.source_rows(sources).to(at.value.dtype) @ at.value[head]
            right = self.target_rows(targets).to(at.value.dtype) @ self.before_target(at.output[head]).T
        # What is said of queries and keys does not touch values and outputs.
        said = [text for text in at.inexact if "quer" not in text]
        return _pairs("OV", left, right, k, sources, targets, said)

    def qk_pairs(
        self, layer: int, head: int, k: int = 50, *, sources: Ids = None, targets: Ids = None, divide: bool = False
    ) -> TokenPairs:
        """The ``k`` largest entries of ``E W_Q W_K^T E^T``: the query of the source looks for the key of the target.

        Under query-key norm (Gemma 3, Qwen 3) the model divides each query and key by its own size, so that an entry
        holds up to one factor a token; ``inexact`` says so. ``divide`` divides as the model does with a token whose
        state is its embedding alone, which is so in layer 0 only.

        Args:
            layer, head, k: as in :meth:`ov_pairs`.
            sources, targets: ids of the query tokens and of the key tokens; None for the whole vocabulary.
            divide: take the sizes of query-key norm for those of the bare embeddings.

        Raises:
            InputError: ``divide`` for a model without query-key norm.
        """
        at = self._head(layer, head)
        with torch.no_grad():
            left = self.source_rows(sources).to(at.query.dtype) @ at.query[head]
            right = self.source_rows(targets).to(at.key.dtype) @ at.key[head]
            said = [text for text in at.inexact if "quer" in text or "norms" in text]
            if divide:
                left, right = (self._divided(rows, layer, head, role) for rows, role in ((left, "q"), (right, "k")))
                said.append("sizes of queries and keys are those of bare embeddings")
        return _pairs("QK", left, right, k, sources, targets, said)

    def _divided(self, rows: torch.Tensor, layer: int, head: int, role: str) -> torch.Tensor:
        """Each row over its root mean square before the gain, as the norm does it."""
        self._probe = self._probe or Probe.run(self.model)
        gains = self._probe.query_key_gains(self.model.attention_layers[layer])
        if role not in gains:
            raise InputError(f"divide=True was asked for; '{self.model.name}' has no query-key norm to divide by.")
        gain = gains[role].to(rows.dtype).reshape(-1, rows.shape[1])
        gain = gain[0 if len(gain) == 1 else head * len(gain) // self.model.attention_layers[layer].heads]
        bare = torch.where(gain == 0, torch.zeros_like(rows), rows / gain)
        return rows / bare.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)

    def _rows(self, matrix: torch.Tensor, tokens: Ids) -> torch.Tensor:
        return matrix if tokens is None else matrix[torch.as_tensor(tokens, device=matrix.device)]

    def _at(self, layer: int) -> FeedForward:
        if not 0 <= layer < self.model.layers:
            raise InputError(
                f"Layer {layer} was asked for; '{self.model.name}' has layers 0 to {self.model.layers - 1}."
            )
        return self.feedforward[layer]

    def _head(self, layer: int, head: int) -> Any:
        if not 0 <= layer < self.model.layers or not 0 <= head < len(self._layers[layer].query):
            raise InputError(f"L{layer}H{head} was asked for; '{self.model.name}' has no such head.")
        return self._layers[layer]


@paper("embedding-space-transformers")
@dataclass
class OVSharpness(Score):
    """How far the top entries of a head's token table ``E W_V W_O E^T`` stand out: their mean over the table's rms.

    A head whose table is spread evenly has nothing to read; one with a few strong pairs does. The sum of squares of the
    table is ``<A^T A, B^T B>`` of its thin factors, so that the table is not made. Entries of a Gaussian table of 2,048
    x 2,048 tokens would score 4.4.

    Args:
        k: top pairs averaged.
        tokens: drawn from the vocabulary, the same for all heads; None for all of it.
        seed: of the draw.

    Example:
        >>> OVSharpness().score(load("all-MiniLM-L6-v2")).top(3)
        [(2, 1), (5, 7), (5, 10)]
    """

    name: ClassVar[str] = "ov-sharpness"
    summary: ClassVar[str] = "weights: how far the top token pairs of a head's value-output table stand out"
    needs: ClassVar[Any] = "weights"
    higher_means: ClassVar[str] = "connects a few token pairs strongly"
    k: int = 50
    tokens: int | None = 2048
    seed: int = 0

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; no data."""
        space = EmbeddingSpace(model)
        vocabulary = len(space.embedding)
        drawn: torch.Tensor | None = None
        if self.tokens is not None and self.tokens < vocabulary:
            rows = np.random.default_rng(self.seed).choice(vocabulary, self.tokens, replace=False)
            drawn = torch.from_numpy(np.sort(rows))
        values = np.full((model.layers, model.heads), np.nan)
        for at in model.attention_layers:
            for head in range(at.heads):
                pairs = space.ov_pairs(at.index, head, self.k, sources=drawn, targets=drawn)
                values[at.index, head] = pairs.sharpness
            if progress is not None:
                progress(at.index + 1, model.layers)
        return self._map(values, model)


def top_entries(
    left: torch.Tensor, right: torch.Tensor, k: int, *, block: int = 4096
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The ``k`` largest entries of ``left @ right.T``, largest first: values, rows and columns, ``[k]`` each.

    Blocks of ``block x block`` entries are made one at a time, rows of the largest norms first; a block whose largest
    norms multiply to no more than the k-th entry so far cannot hold one, and is skipped with all after it.

    Args:
        left, right: ``[n, d]`` and ``[m, d]``.
        k: how many; fewer where there are fewer entries.
        block: rows and columns held at once.
    """
    sizes, orders = zip(
        *(torch.sort(side.norm(dim=1), descending=True, stable=True) for side in (left, right)), strict=True
    )
    a, b = left[orders[0]], right[orders[1]]
    values, rows, columns = left.new_empty(0), orders[0][:0], orders[1][:0]
    k = min(k, len(left) * len(right))
    for i in range(0, len(a), block):
        for j in range(0, len(b), block):
            full = len(values) == k
            if full and float(sizes[0][i] * sizes[1][j]) < float(values[-1]):
                break
            entries = a[i : i + block] @ b[j : j + block].T
            if full:
                row, column = torch.nonzero(entries > values[-1], as_tuple=True)
            else:
                best = entries.flatten().topk(min(k, entries.numel())).indices
                row, column = best // entries.shape[1], best % entries.shape[1]
            found = torch.cat([values, entries[row, column]])
            kept = found.topk(min(k, len(found))).indices
            values = found[kept]
            rows, columns = torch.cat([rows, row + i])[kept], torch.cat([columns, column + j])[kept]
    return values, orders[0][rows], orders[1][columns]


def _pairs(
    kind: Literal["OV", "QK"],
    left: torch.Tensor,
    right: torch.Tensor,
    k: int,
    sources: Ids,
    targets: Ids,
    said: Sequence[str],
) -> TokenPairs:
    if k < 1:
        raise InputError(f"The top {k} pairs were asked for; expected one or more.")
    values, rows, columns = top_entries(left, right, k)
    if sources is not None:
        rows = torch.as_tensor(sources, device=rows.device)[rows]
    if targets is not None:
        columns = torch.as_tensor(targets, device=columns.device)[columns]
    first, second = (side.double().T @ side.double() for side in (left, right))
    rms = float(((first * second).sum().clamp(min=0) / (len(left) * len(right))).sqrt())
    return TokenPairs(kind, values, rows, columns, rms, "; ".join(said))


def _top(row: torch.Tensor, k: int) -> list[tuple[int, float]]:
    found = row.topk(min(k, len(row)))
    return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))
