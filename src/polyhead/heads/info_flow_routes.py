"""Information flow routes: which heads, tokens and feed-forward blocks a state was made of, from the top down."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from polyhead.errors import InputError, UnreadableModelError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Progress, Score
from polyhead.heads.flow_graph import FlowEdge, FlowGraph, FlowNode
from polyhead.heads.residual import Block, blocks
from polyhead.papers import paper
from polyhead.tap import AttentionCall, attention_weights

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["InformationFlowRoutes", "LayerFlow"]

_CHUNK = 1 << 17  # numbers of edge vectors held at once: what stays in a core's cache


@dataclass(frozen=True)
class LayerFlow:
    """Importance of every edge of one layer, for a batch; the edges into a node sum to 1.

    Into the state after attention (into the layer's output, where the block is parallel):

    Attributes:
        layer: index. parallel: the block adds attention and feed-forward at once, and has one node a token.
        heads: ``[batch, heads, tokens, sources]``. residual, bias: ``[batch, tokens]``.
        out_residual, out_ffn, out_bias: ``[batch, tokens]``, into the layer's output; of a parallel block, ``out_ffn``
            belongs with the first three and the others are 0.
    """

    layer: int
    parallel: bool
    heads: torch.Tensor
    residual: torch.Tensor
    bias: torch.Tensor
    out_residual: torch.Tensor
    out_ffn: torch.Tensor
    out_bias: torch.Tensor


@paper("info-flow-routes")
@dataclass
class InformationFlowRoutes(Score):
    """How much of the token states each head brings in (Ferrando and Voita, info-flow-routes, section 2).

    A state ``y`` is the sum of what flows into it: the residual stream, for each head and source token the vector
    ``alpha * v W_O``, and the feed-forward block. The importance of a part ``z`` is its share of the proximity
    ``max(0, |y|_1 - |y - z|_1)``. A norm between a part and the sum (BERT, Gemma 3) is made linear by its own
    per-token scale; biases are a part of their own; a state that no part comes near is put down to the residual
    stream. Vectors sum to the state exactly; nothing is approximated but the idea itself: attention weights, and the
    scale of norms, count as given.

    Args:
        threshold: edges below it are not followed (the paper's tau).
        over: "tokens" takes the mean over every token's state; "route" the mean, over texts, of what is kept on the
            route from the text's last token.
        max_tokens: texts are cut there.
        batch_size: texts a batch.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> routes = InformationFlowRoutes(threshold=0.05)
        >>> heads = routes.score(model, ["A man is playing a guitar."])
        >>> graph = routes.extract(model, "A man is playing a guitar.", position=0)
        >>> graph.tokens[graph.position]
        '[CLS]'
    """

    name: ClassVar[str] = "info-flow-routes"
    summary: ClassVar[str] = "share of the token states that flows in through each head"
    needs: ClassVar[Any] = "texts"
    higher_means: ClassVar[str] = "more of the states comes through the head"

    threshold: float = 0.04
    over: Literal["tokens", "route"] = "tokens"
    max_tokens: int = 64
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1 or self.over not in ("tokens", "route"):
            raise InputError(
                f"threshold={self.threshold}, over={self.over!r} were given; expected a threshold of 0 to 1 and "
                "'tokens' or 'route'."
            )

    def score(
        self, model: HeadedModel, data: Sequence[str] | None = None, *, progress: Progress | None = None
    ) -> HeadMap:
        """Mean importance of each head, summed over the tokens it reads from.

        Args:
            model: any that attends through transformers' attention interface.
            data: texts; the first 64 of AG News where None.
            progress: called after each batch.
        """
        from polyhead.data import load_texts

        texts = load_texts("ag-news", 64) if data is None else list(data)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"'{self.name}' needs a list of texts, got {texts!r:.80}.")
        total, count, cut = np.zeros((model.layers, model.heads)), 0.0, 0
        for first in range(0, len(texts), self.batch_size):
            some = texts[first : first + self.batch_size]
            cut += sum(len(ids) > self.max_tokens for ids in model.tokenizer(some)["input_ids"])
            inputs = model.tokenize(some, truncation=True, max_length=self.max_tokens)
            values, weight = self.batch_importance(model, inputs)
            total, count = total + values, count + weight
            if progress is not None:
                progress(min(first + self.batch_size, len(texts)), len(texts))
        words = f"{len(texts)} texts" + (f", {cut} cut at {self.max_tokens} tokens" if cut else "")
        return self._map(total / max(count, 1), model, words)

    def batch_importance(self, model: HeadedModel, inputs: dict[str, torch.Tensor]) -> tuple[np.ndarray, float]:
        """Importance ``[layers, heads]`` summed over the tokens (or routes) of a batch, and how many those are."""
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        values = np.zeros((model.layers, model.heads))
        if self.over == "route":
            for row in range(len(mask)):
                one = {key: value[row : row + 1][:, mask[row]] for key, value in inputs.items()}
                values += self.extract_ids(model, one).head_importance()
            return values, float(len(mask))

        def add(flow: LayerFlow) -> None:
            summed = flow.heads.sum(-1).masked_fill(~mask[:, None], 0).sum((0, 2))
            values[flow.layer, : len(summed)] += summed.double().cpu().numpy()

        self.run(model, inputs, add)
        return values, float(mask.sum())

    def extract(self, model: HeadedModel, text: str, position: int = -1) -> FlowGraph:
        """The route to one token's last state.

        Args:
            model: see :meth:`score`.
            text: one text.
            position: which token, counted from the end where negative.

        Raises:
            InputError: the text has no such token.
        """
        return self.extract_ids(model, model.tokenize([text], truncation=True, max_length=self.max_tokens), position)

    def extract_ids(self, model: HeadedModel, inputs: dict[str, torch.Tensor], position: int = -1) -> FlowGraph:
        """As :meth:`extract`, from ready model inputs of one row without padding."""
        rows, length = inputs["input_ids"].shape
        if rows != 1 or not -length <= position < length:
            raise InputError(
                f"Token {position} of {rows} texts was asked for; expected one of {length} tokens of one text."
            )
        position %= length
        # From the bottom up only the few edges above the threshold are kept; the route is then followed from the top.
        into: dict[FlowNode, list[FlowEdge]] = {}
        self.run(model, inputs, lambda flow: _keep(flow, self.threshold, into))
        edges, waiting, seen = [], [FlowNode(model.layers - 1, "out", position)], set()
        while waiting:
            node = waiting.pop(0)
            for edge in into.get(node, []):
                edges.append(edge)
                if edge.source is not None and edge.source not in seen:
                    seen.add(edge.source)
                    waiting.append(edge.source)
        edges.sort(key=lambda edge: (-edge.target.height, edge.target.token, -edge.importance))
        names = self._names(model, inputs["input_ids"][0])
        return FlowGraph(model.name, names, model.layers, model.heads, position, self.threshold, tuple(edges))

    def run(self, model: HeadedModel, inputs: dict[str, torch.Tensor], use: Callable[[LayerFlow], None]) -> None:
        """One forward pass; ``use`` is called with each layer's edges, which are dropped before the next layer's.

        Raises:
            UnreadableModelError: attention outside the interface, gated after it, or a block of an unknown form.
        """
        mask = inputs.get("attention_mask")
        accepts = inspect.signature(model.module.forward).parameters
        extra = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}  # the logits are not looked at
        with _edges(model, use, None if mask is None else mask.bool()), torch.inference_mode():
            model(**inputs, **extra)

    @staticmethod
    def _names(model: HeadedModel, ids: torch.Tensor) -> tuple[str, ...]:
        if model.files is None:
            return tuple(str(int(id)) for id in ids)
        return tuple(model.tokenizer.convert_ids_to_tokens(ids.tolist()))


@contextmanager
def _edges(model: HeadedModel, use: Callable[[LayerFlow], None], real: torch.Tensor | None) -> Iterator[None]:
    held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(layer: int, call: AttentionCall) -> None:
        wide = torch.promote_types(call.value.dtype, torch.float32)
        weights, value = attention_weights(call).to(wide), call.value.to(wide)
        value = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
        held[layer] = weights, value

    def check(layer: int, z: torch.Tensor) -> None:
        weights, value = held[layer]
        mixed = (weights @ value).transpose(1, 2)
        if real is not None:  # a kernel gives what it likes for padding
            mixed, z = mixed[real], z[real]
        if (mixed - z).abs().max() > (1e-3 if z.dtype in (torch.float32, torch.float64) else 5e-2) * z.abs().max():
            raise UnreadableModelError(
                f"Layer {layer} of '{model.name}' changes its head outputs after attention (a gate, perhaps): they are "
                "not the attention-weighted sum of values that information flow is traced through."
            )

    def end(block: Block) -> None:
        use(_layer_flow(block, *held.pop(block.layer), model))

    with model.tap_attention(watch), model.tap_heads(check), blocks(model, end):
        yield


def _layer_flow(block: Block, weights: torch.Tensor, value: torch.Tensor, model: HeadedModel) -> LayerFlow:
    """Proximities of all edges of a layer, normalised (info-flow-routes, equations 5 and 6, with the L1 norm)."""
    y = block.y if block.kind == "parallel" else block.mid
    scales = (*block.branch, *((block.mid_norm,) if block.mid_norm else ()))
    factor = torch.ones_like(y[..., :1])
    output, bias = model.output_weight(block.layer).to(y.dtype), model.output_bias(block.layer)
    constant = torch.zeros_like(y) if bias is None else bias.to(y.dtype).expand_as(y)
    for scale in scales:
        factor, constant = factor * scale.token, scale(constant) + scale.bias
    heads = torch.zeros_like(weights)
    for head in range(weights.shape[1]):
        brought = value[:, head] @ output[head]
        for scale in scales:
            brought = scale.fixed(brought)
        heads[:, head] = _scaled_proximity(y, weights[:, head] * factor, brought)
    residual = _proximity(y, block.mid_norm(block.x) if block.mid_norm else block.x)
    constants = _proximity(y, constant)
    zero = torch.zeros_like(residual)
    if block.kind == "parallel":
        forward = _proximity(y, block.feedforward)
        residual, total = _filled(residual, heads.sum((1, 3)) + constants + forward)
        shares = (heads / total[:, None, :, None], residual / total, constants / total)
        return LayerFlow(block.layer, True, *shares, zero, forward / total, zero)
    residual, total = _filled(residual, heads.sum((1, 3)) + constants)
    shares = (heads / total[:, None, :, None], residual / total, constants / total)
    parts = [block.mid, block.feedforward]
    if block.out_norm is not None:
        parts = [*map(block.out_norm, parts), block.out_norm.bias.expand_as(y)]
    near = [_proximity(block.y, part) for part in parts] + [zero] * (3 - len(parts))
    near[0], total = _filled(near[0], near[1] + near[2])
    return LayerFlow(block.layer, False, *shares, *(one / total for one in near))


def _filled(residual: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual's proximity and the sum of all; where no part comes near the state, the residual is taken whole."""
    residual = torch.where(residual + others == 0, torch.ones_like(residual), residual)
    return residual, residual + others


def _proximity(y: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``max(0, |y| - |y - part|)``, of vectors ``[..., hidden]``."""
    return (y.abs().sum(-1) - (y - part).abs().sum(-1)).clamp(min=0)


def _scaled_proximity(y: torch.Tensor, factors: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Proximity to ``y [batch, tokens, hidden]`` of ``factors[t, s] * vectors[s]``: ``[batch, tokens, sources]``.

    Some query rows at a time, so that no more than ``_CHUNK`` numbers of edge vectors are held.
    """
    found = torch.zeros_like(factors)
    rows = max(1, _CHUNK // max(1, vectors.shape[1] * vectors.shape[2]))
    size = y.abs().sum(-1, keepdim=True)
    for batch in range(len(y)):
        for first in range(0, y.shape[1], rows):
            some = slice(first, first + rows)
            seen = factors[batch, some].ne(0).any(0).nonzero()[:, 0]  # not the future, nor beyond a window
            part, vector = factors[batch, some][:, seen, None], vectors[batch, None, seen]
            rest = torch.addcmul(y[batch, some, None], part, vector, value=-1)
            found[batch, some, seen] = size[batch, some] - torch.linalg.vector_norm(rest, ord=1, dim=-1)
    return found.clamp(min=0)


def _keep(flow: LayerFlow, threshold: float, into: dict[FlowNode, list[FlowEdge]]) -> None:
    """Add the edges of a layer (of the first row) that reach the threshold and are not 0."""
    layer, stage = flow.layer, "out" if flow.parallel else "attention"
    heads = flow.heads[0]
    for head, token, source in torch.nonzero((heads >= threshold) & (heads > 0)).tolist():
        target = FlowNode(layer, stage, token)  # type: ignore[arg-type]
        edge = FlowEdge(FlowNode(layer - 1, "out", source), target, "head", head, float(heads[head, token, source]))
        into.setdefault(target, []).append(edge)
    for token in range(heads.shape[1]):
        below, out = FlowNode(layer - 1, "out", token), FlowNode(layer, "out", token)
        middle = out if flow.parallel else FlowNode(layer, "attention", token)
        for source, target, kind, values in (
            (below, middle, "residual", flow.residual),
            (None, middle, "bias", flow.bias),
            (middle, out, "residual", flow.out_residual),
            (below if flow.parallel else middle, out, "ffn", flow.out_ffn),
            (None, out, "bias", flow.out_bias),
        ):
            importance = float(values[0, token])
            if importance >= threshold and importance > 0:
                into.setdefault(target, []).append(FlowEdge(source, target, kind, None, importance))  # type: ignore[arg-type]
