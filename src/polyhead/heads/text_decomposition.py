"""An embedding as a sum over heads and tokens.

Of a text encoder as of CLIP: the vector is a weighted sum of last token states, projected, and every state is a sum of
what heads and feed-forward layers wrote. With the statistics of all norms held as they were, each part goes its way to
the vector on its own, and the parts sum to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from polyhead.act.vectors import Heads, head_mask
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads._readout import Readout, outside_calls, own_readout, token_readout
from polyhead.heads.base import Needs, Progress, Score
from polyhead.heads.direct import fixed_back, fixed_through, pooled_states, pooled_writes, token_weights
from polyhead.heads.residual import Block, TokenScale, blocks
from polyhead.papers import paper
from polyhead.pooling import POOLERS
from polyhead.tap import AttentionCall, attention_weights

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["EmbeddingDecomposer", "EmbeddingParts", "EmbeddingShare", "patch_map"]

Inputs = Mapping[str, torch.Tensor]
_TOLERANCE = 1e-3  # of the vector's length: what the parts may miss of it


@dataclass(frozen=True)
class EmbeddingParts:
    """Vectors ``[batch, dim]`` as a sum.

    Attributes:
        heads: ``[batch, layers, heads, dim]``.
        feedforward: ``[batch, layers, dim]``.
        embedding: ``[batch, dim]``, of what enters layer 0: for an image, class token and patches.
        rest: ``[batch, dim]``: biases of norms, output projections and readout, and what a pooling head adds beyond.
        vector: ``[batch, dim]``, the embedding as the model gives it.
    """

    heads: torch.Tensor
    feedforward: torch.Tensor
    embedding: torch.Tensor
    rest: torch.Tensor
    vector: torch.Tensor

    def total(self) -> torch.Tensor:
        """The sum of all parts, ``[batch, dim]``: equals ``vector`` up to rounding."""
        return self.heads.sum((1, 2)) + self.feedforward.sum(1) + self.embedding + self.rest

    def mean_ablated(self, heads: Heads) -> torch.Tensor:
        """The vectors with chosen heads' direct parts at their mean over the batch: ``[batch, dim]``.

        What later layers make of a head stays; :class:`polyhead.act.MeanAblate` takes its whole effect away.
        """
        chosen = head_mask(heads, *self.heads.shape[1:3]).to(self.heads.device)
        mine = self.heads[:, chosen].sum(1)
        return self.vector - mine + mine.mean(0)

    @classmethod
    def joined(cls, parts: Sequence[EmbeddingParts]) -> EmbeddingParts:
        """Batches one after the other."""
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))


@dataclass
class _Path:
    """One forward pass: how each part of the residual stream gets to the vector.

    ``head_scales`` and ``feed_scales`` are the norms from a layer's output projection, and its feed-forward part, to
    the pooling.
    """

    readout: Readout
    heads: list[torch.Tensor]
    blocks: list[Block]
    head_scales: list[list[TokenScale]]
    feed_scales: list[list[TokenScale]]
    start_scales: list[TokenScale]
    biases: list[tuple[torch.Tensor, list[TokenScale]]]
    vector: torch.Tensor


@paper("clip-text-decomposition")
class EmbeddingDecomposer:
    """Writes a model's embedding as a sum over layers, heads and tokens (Gandelsman et al., clip-text-decomposition).

    Works on norms before attention (CLIP, SigLIP, ViT, decoders) and after the sums (BERT). No model class is named;
    every result is checked against the model's own vector.

    Args:
        model: a text encoder, or one tower of a two-tower model; :meth:`of_tower` takes the second apart.
        pooling: name of a pooling that is a weighted sum of token states ("mean", "cls", "last", ...), or "own" for
            the vector that the tower itself gives.
        projection: a linear layer, or a matrix ``[out, hidden]``, after the pooling.
        normalize: divide by the vector's length, held fixed.

    Raises:
        InputError: no such pooling.

    Example:
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> parts = EmbeddingDecomposer(model, normalize=True)(model.tokenize(["Stocks fell.", "The match was won."]))
        >>> parts.heads.shape, bool((parts.total() - parts.vector).abs().max() < 1e-4)
        (torch.Size([2, 6, 12, 384]), True)
    """

    def __init__(
        self,
        model: HeadedModel,
        pooling: str = "mean",
        projection: nn.Linear | torch.Tensor | None = None,
        normalize: bool = False,
    ) -> None:
        if pooling != "own" and pooling not in POOLERS:
            raise InputError(f"No pooling '{pooling}': expected 'own' or one of {', '.join(POOLERS)}.")
        self.model, self.pooling, self.projection, self.normalize = model, pooling, projection, normalize

    @classmethod
    def of_tower(cls, module: nn.Module, tower: str, normalize: bool = True) -> EmbeddingDecomposer:
        """One tower of a two-tower model (``CLIPModel``, ``SiglipModel``) with its projection into the shared space.

        Args:
            module: the whole model.
            tower: "vision" or "text".
            normalize: as in the class; two-tower models compare directions.
        """
        from polyhead.model import load

        model = load(module, tower=tower)
        projection = getattr(module, {"vision": "visual_projection", "text": "text_projection"}[tower], None)
        return cls(model, "own", projection, normalize)

    def __call__(self, inputs: Inputs) -> EmbeddingParts:
        """Take the vectors of a batch apart. Raises InputError where the parts don't sum to them."""
        path = self._run(inputs)
        readout = path.readout
        heads, feed = [], []
        width = self.model.heads
        for layer, block in enumerate(path.blocks):
            weight = self.model.output_weight(layer).detach()
            scales = path.head_scales[layer]
            part = self._summed(readout, lambda pool: pooled_writes(path.heads[layer], weight, scales, pool))  # noqa: B023
            heads.append(nn.functional.pad(part, (0, 0, 0, width - part.shape[1])))
            feed.append(self._states(readout, block.feedforward, path.feed_scales[layer]))
        rest = readout.rest + readout.constant
        for bias, scales in path.biases:
            rest = rest + self._constant(readout, bias, scales)
        start = self._states(readout, path.blocks[0].x, path.start_scales)
        found = EmbeddingParts(torch.stack(heads, 1), torch.stack(feed, 1), start, rest, path.vector)
        missed = float((found.total() - found.vector).norm(dim=-1).max() / found.vector.norm(dim=-1).max())
        if not missed < (_TOLERANCE if self.model.dtype in (torch.float32, torch.float64) else 0.05):
            raise InputError(
                f"The parts of '{self.model.name}' miss {missed:.1%} of its vector: expected a pooling that is a "
                f"weighted sum of token states, was {self.pooling!r}."
            )
        return found

    def texts(
        self, texts: Sequence[str], *, batch_size: int = 16, max_tokens: int = 256, progress: Progress | None = None
    ) -> EmbeddingParts:
        """The parts of many texts: ``len(texts) * layers * heads * dim`` numbers."""
        found = []
        for first in range(0, len(texts), batch_size):
            some = list(texts[first : first + batch_size])
            found.append(self(self.model.tokenize(some, truncation=True, max_length=max_tokens)))
            if progress is not None:
                progress(first + len(some), len(texts))
        return EmbeddingParts.joined(found)

    def token_relevance(self, inputs: Inputs, directions: torch.Tensor) -> torch.Tensor:
        """What each head takes from each token along a direction: ``[batch, layers, heads, tokens]``.

        The contributions ``c_{l,h,i}`` of source tokens (an image's patches) times the direction; summed over tokens
        they are the head's part. The direction goes back to the head instead of the parts forward, one layer's
        attention held at a time.

        Args:
            inputs: as the model takes them.
            directions: ``[dim]`` or ``[batch, dim]``: another text's embedding, a class's.

        Raises:
            UnreadableModelError: the model does not attend through transformers' attention interface.
        """
        path = self._run(inputs)
        to = path.vector
        wanted = directions.to(to).expand(len(to), -1)
        found: dict[int, torch.Tensor] = {}

        def watch(layer: int, call: AttentionCall) -> None:
            weight = self.model.output_weight(layer).detach().to(to)
            value = _values(call).to(to)
            scales, total = path.head_scales[layer], torch.zeros(())
            for pool, matrix in zip(path.readout.pools, path.readout.matrices, strict=True):
                inside = torch.einsum("hdo,bo->bhd", weight, fixed_back(scales, wanted @ matrix))
                sources = torch.einsum("bt,bhti->bhi", token_weights(scales, pool), _weights(call, pool))
                total = total + sources * torch.einsum("bhid,bhd->bhi", value, inside)
            found[layer] = nn.functional.pad(total, (0, 0, 0, self.model.heads - total.shape[1]))

        with self.model.tap_attention(watch), torch.no_grad():
            self.model(**inputs)
        return torch.stack([found[layer] for layer in range(self.model.layers)], 1)

    def token_parts(self, inputs: Inputs, heads: Iterable[tuple[int, int]]) -> dict[tuple[int, int], torch.Tensor]:
        """The contributions ``c_{l,h,i}`` themselves of a few heads, ``[batch, tokens, dim]`` each."""
        path, chosen = self._run(inputs), list(heads)
        to, found = path.vector, {}

        def watch(layer: int, call: AttentionCall) -> None:
            for head in (head for at, head in chosen if at == layer):
                weight = self.model.output_weight(layer)[head].detach().to(to)
                written = fixed_through(path.head_scales[layer], _values(call)[:, head].to(to) @ weight)
                total = torch.zeros(())
                for pool, matrix in zip(path.readout.pools, path.readout.matrices, strict=True):
                    weights = token_weights(path.head_scales[layer], pool)
                    sources = torch.einsum("bt,bti->bi", weights, _weights(call, pool)[:, head])
                    total = total + sources[..., None] * (written @ matrix.T)
                found[layer, head] = total

        with self.model.tap_attention(watch, layers=sorted({layer for layer, _ in chosen})), torch.no_grad():
            self.model(**inputs)
        return found

    def _run(self, inputs: Inputs) -> _Path:
        found: list[Block] = []
        heads: list[torch.Tensor] = []
        with (
            torch.no_grad(),
            outside_calls(self.model) as outside,
            blocks(self.model, found.append),
            self.model.tap_heads(lambda _, z: heads.append(z)),
        ):
            outputs = self.model(**inputs)
        y = found[-1].y
        if self.pooling == "own":
            pooled = getattr(outputs, "pooler_output", None)
            if pooled is None:
                raise InputError(f"'{self.model.name}' gives no vector of its own; name a pooling such as 'mean'.")
            readout, vector = own_readout(pooled, y, outside, self.model.name), pooled.to(y)
        else:
            states = outputs.last_hidden_state
            mask = inputs.get("attention_mask", torch.ones(states.shape[:2], device=states.device))
            pooler = POOLERS[self.pooling]()
            # A weighted sum of token states shows its weights when the states are unit vectors.
            eye = torch.eye(states.shape[1], dtype=y.dtype, device=y.device).expand(len(states), -1, -1)
            readout = token_readout(states, y, outside, pooler(eye, mask), self.model.name)
            vector = pooler(states.masked_fill(mask[..., None] == 0, 0), mask).to(y)
        if self.projection is not None:
            readout = readout.projected(self.projection)
            weight = self.projection.weight if isinstance(self.projection, nn.Linear) else self.projection
            vector = vector @ weight.detach().to(y).T
            if isinstance(self.projection, nn.Linear) and self.projection.bias is not None:
                vector = vector + self.projection.bias.detach().to(y)
        if self.normalize:
            length = vector.norm(dim=-1).clamp(min=1e-12)
            readout, vector = readout.scaled(1 / length), vector / length[:, None]
        return self._path(readout, [z.to(y) for z in heads], found, vector)

    def _path(self, readout: Readout, heads: list[torch.Tensor], found: list[Block], vector: torch.Tensor) -> _Path:
        scales = [readout.norm] if readout.norm is not None else []
        biases: list[tuple[torch.Tensor, list[TokenScale]]] = [(norm.bias, []) for norm in scales]
        head_scales: list[list[TokenScale]] = []
        feed_scales: list[list[TokenScale]] = []
        for block in reversed(found):
            if block.out_norm is not None and block.mid_norm is not None:
                biases.append((block.out_norm.bias, scales))
                scales = [block.out_norm, *scales]
                feed_scales.insert(0, scales)
                biases.append((block.mid_norm.bias, scales))
                scales = [block.mid_norm, *scales]
            else:
                feed_scales.insert(0, scales)
            branch = list(block.branch)
            offset = self.model.output_bias(block.layer)
            if offset is not None:
                biases.append((offset.detach().to(vector), [*branch, *scales]))
            biases += [(norm.bias, [*branch[place + 1 :], *scales]) for place, norm in enumerate(branch)]
            head_scales.insert(0, [*branch, *scales])
        return _Path(readout, heads, found, head_scales, feed_scales, scales, biases, vector)

    def _summed(self, readout: Readout, part: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """``part(pool) [batch, ..., hidden]`` of every pool through its matrix, summed: ``[batch, ..., dim]``."""
        pairs = zip(readout.pools, readout.matrices, strict=True)
        return torch.stack([part(pool) @ matrix.T for pool, matrix in pairs]).sum(0)

    def _states(self, readout: Readout, states: torch.Tensor, scales: list[TokenScale]) -> torch.Tensor:
        return self._summed(readout, lambda pool: fixed_through(scales, pooled_states(states, scales, pool)))

    def _constant(self, readout: Readout, bias: torch.Tensor, scales: list[TokenScale]) -> torch.Tensor:
        fixed = fixed_through(scales, bias)
        return self._summed(readout, lambda pool: token_weights(scales, pool).sum(1)[:, None] * fixed)


def _values(call: AttentionCall) -> torch.Tensor:
    """Value vectors ``[batch, heads, keys, head_dim]``, those of shared heads repeated."""
    return call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], dim=1)


def _weights(call: AttentionCall, pool: torch.Tensor) -> torch.Tensor:
    """Attention weights ``[batch, heads, tokens, keys]``; rows that are not pooled are zero, as they may be NaN."""
    return attention_weights(call).to(pool).masked_fill((pool == 0)[:, None, :, None], 0)


def patch_map(relevance: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
    """Relevance ``[..., tokens]`` of an image's tokens as maps ``[..., rows, columns]``; class tokens stand first.

    Args:
        relevance: of :meth:`EmbeddingDecomposer.token_relevance`, perhaps summed over layers and heads.
        grid: rows and columns of patches; None for a square, the largest that the tokens fill.

    Raises:
        InputError: fewer tokens than patches.
    """
    tokens = relevance.shape[-1]
    rows, columns = grid if grid is not None else (int(tokens**0.5), int(tokens**0.5))
    if rows * columns > tokens:
        raise InputError(f"A grid of {rows} x {columns} patches was asked for; there are {tokens} tokens.")
    return relevance[..., tokens - rows * columns :].unflatten(-1, (rows, columns))


@paper("clip-text-decomposition")
@dataclass
class EmbeddingShare(Score):
    """Share of the embedding's variance over texts that is a head's direct part: ``cov(c, e) / var(e)``, summed.

    Shares of all heads, the feed-forward layers, the embedding and the rest sum to 1; a head that works against the
    others has a negative one. ``data``: texts; None takes 64 news items.

    Args:
        pooling, normalize: as in :class:`EmbeddingDecomposer`.
        max_tokens, batch_size: of texts.

    Example:
        >>> EmbeddingShare().score(polyhead.load("all-MiniLM-L6-v2"), ["a cat", "a dog", "a stock market"]).shape
        (6, 12)
    """

    name: ClassVar[str] = "embedding-share"
    summary: ClassVar[str] = "share of the embedding's variance over texts that a head writes directly"
    needs: ClassVar[Needs] = "texts"
    higher_means: ClassVar[str] = "its output reaches the embedding directly and tells texts apart there"

    pooling: str = "mean"
    normalize: bool = True
    max_tokens: int = 256
    batch_size: int = 16

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`. Raises InputError for fewer than two texts."""
        from polyhead.data import load_texts

        texts = load_texts("ag-news", 64) if data is None else data
        if isinstance(texts, str) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
            raise InputError(f"embedding-share was given {type(texts).__name__}, expected two texts or more.")
        decomposer = EmbeddingDecomposer(model, self.pooling, normalize=self.normalize)
        product: Any = 0.0
        sums: list[Any] = [0.0, 0.0, 0.0]
        for first in range(0, len(texts), self.batch_size):
            some = texts[first : first + self.batch_size]
            parts = decomposer.texts(some, batch_size=self.batch_size, max_tokens=self.max_tokens)
            heads, vector = parts.heads.double(), parts.vector.double()
            product = product + torch.einsum("blhd,bd->lh", heads, vector)
            for place, value in enumerate((heads.sum(0), vector.sum(0), vector.square().sum())):
                sums[place] = sums[place] + value
            if progress is not None:
                progress(first + len(some), len(texts))
        variance = sums[2] - sums[1].square().sum() / len(texts)
        values = (product - sums[0] @ sums[1] / len(texts)) / variance
        for layer in model.attention_layers:
            values[layer.index, layer.heads :] = torch.nan
        return self._map(values, model, "ag-news" if data is None else "texts")
