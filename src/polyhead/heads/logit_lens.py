"""The logit lens of a head: what it adds to each vocabulary logit, with the final norm's scale held as it was.

The last state of a decoder is a sum, ``h = embedding + sum_l (attention_l + feedforward_l)``, and attention is a sum
over heads. A norm with its per-token scale frozen is linear, so each part goes through it and the unembedding on its
own, and the logits are the sum of all parts, exactly (before a soft cap, where the model has one). Where a norm stands
after ``o_proj`` (Gemma 2 and 3, OLMo 2) its scale is frozen at the recorded value too: that scale depends on all heads
of the layer together, so there "what a head adds" means what it adds with the others as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import nn

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Needs, Progress, Score
from polyhead.heads.residual import Block, TokenScale, blocks
from polyhead.heads.tasks import NextToken, Task
from polyhead.model import HeadedModel
from polyhead.recording import blocks_of

__all__ = ["DirectLogit", "LogitLens", "LogitParts", "Pass", "logits_at"]


@dataclass
class Pass:
    """One forward pass, kept for taking its logits apart.

    Attributes:
        embedding: what enters layer 0, ``[batch, tokens, hidden]``.
        heads: per layer, ``[batch, tokens, heads, head_dim]``.
        feedforward: per layer, ``[batch, tokens, hidden]``.
        branches: per layer, the norms between output projection and residual stream.
        norm: the final norm with its scale as it was.
        logits: as the unembedding gave them, ``[positions, vocabulary]`` of the positions asked for.
    """

    embedding: torch.Tensor
    heads: list[torch.Tensor]
    feedforward: list[torch.Tensor]
    branches: list[tuple[TokenScale, ...]]
    norm: TokenScale
    logits: torch.Tensor


@dataclass(frozen=True)
class LogitParts:
    """Logits of one position as a sum.

    Attributes:
        tokens: ids of the columns, ``[columns]``.
        heads: ``[layers, heads, columns]``.
        feedforward: ``[layers, columns]``.
        embedding: ``[columns]``, position embeddings included.
        bias: ``[columns]``, of the output projections, the norms and the unembedding.
        logits: ``[columns]``, as the model gave them, before any soft cap.
    """

    tokens: torch.Tensor
    heads: torch.Tensor
    feedforward: torch.Tensor
    embedding: torch.Tensor
    bias: torch.Tensor
    logits: torch.Tensor

    def total(self) -> torch.Tensor:
        """The sum of all parts, ``[columns]``: equals ``logits`` up to rounding."""
        return self.heads.sum((0, 1)) + self.feedforward.sum(0) + self.embedding + self.bias

    def top(self, layer: int, head: int, k: int = 5, lowest: bool = False) -> list[tuple[int, float]]:
        """The ``k`` tokens a head raises (or lowers) most, as ``(token id, logits above its mean over columns)``."""
        row = self.heads[layer, head] - self.heads[layer, head].mean()
        found = row.topk(min(k, len(row)), largest=not lowest)
        return [(int(self.tokens[i]), float(v)) for v, i in zip(found.values, found.indices, strict=True)]


class LogitLens:
    """Takes the logits of a decoder apart by head.

    Args:
        model: a decoder loaded with its language-model head, whose final norm reads the residual stream (GPT-2, Llama,
            Qwen, Gemma, OLMo, GPT-NeoX).

    Raises:
        InputError: a model without an unembedding.

    Example:
        >>> model = load("gemma-3-270m", lm_head=True)
        >>> parts = LogitLens(model).parts(model.tokenize(["The capital of France is"]))
        >>> model.tokenizer.decode([parts.top(12, 2, k=1)[0][0]])
        ' France'
    """

    def __init__(self, model: HeadedModel) -> None:
        self.model = model
        find = getattr(model.module, "get_output_embeddings", None)
        head = find() if find is not None else None
        if not isinstance(head, nn.Linear):
            raise InputError(f"'{model.name}' gives no logits: load a decoder with its head, load(name, lm_head=True).")
        self.head: nn.Linear = head
        self.unembedding = head.weight.detach()

    def run(self, inputs: Mapping[str, torch.Tensor], rows: Sequence[int] = (), positions: Sequence[int] = ()) -> Pass:
        """Run the model once and keep what the lens needs; logits are computed at ``rows, positions`` alone.

        Raises:
            InputError: something else than one norm stands between the residual stream and the unembedding.
        """
        found: list[Block] = []
        heads: list[torch.Tensor] = []
        with (
            torch.no_grad(),
            _outside_layers(self.model, self.head) as calls,
            logits_at(self.head, rows, positions) as (given, logits),
            blocks(self.model, found.append),
            self.model.tap_heads(lambda _, z: heads.append(z)),
        ):
            self.model(**inputs, use_cache=False)
        last, norm = found[-1].y, None
        for module, state, gave in calls:
            if torch.equal(gave, given[-1]) and torch.equal(state.to(last.dtype), last):
                norm = TokenScale.of(module, state, gave)
        if norm is None or any(block.kind == "post-norm" for block in found):
            raise InputError(
                f"The logits of '{self.model.name}' cannot be taken apart: expected a sum of layers that goes through "
                "one norm into the unembedding (GPT-2, Llama, Gemma), not norms after each sum or a projection between."
            )
        wide = [z.to(last.dtype) for z in heads]
        rest = [block.feedforward for block in found]
        return Pass(found[0].x, wide, rest, [block.branch for block in found], norm, logits[-1][0])

    def parts(
        self, inputs: Mapping[str, torch.Tensor], row: int = 0, position: int = -1, tokens: Sequence[int] | None = None
    ) -> LogitParts:
        """Logits of one position of one row of a batch, taken apart.

        Args:
            inputs: as the model takes them.
            row, position: which; negative positions count from the last.
            tokens: ids to look at; None for the whole vocabulary (``layers * heads * vocabulary`` numbers).
        """
        seen = self.run(inputs, [row], [position])
        columns = torch.arange(len(self.unembedding)) if tokens is None else torch.as_tensor(list(tokens))
        columns = columns.to(self.unembedding.device)
        unembed = self.unembedding[columns].to(seen.embedding.dtype)
        at = slice(position, position + 1 or None)

        def here(scale: TokenScale) -> TokenScale:
            return TokenScale(scale.token[row : row + 1, at], scale.weight, scale.bias, scale.centers)

        norm = here(seen.norm)

        def logits(state: torch.Tensor) -> torch.Tensor:
            return norm(state) @ unembed.T

        bias = norm.bias @ unembed.T
        if self.head.bias is not None:
            bias = bias + self.head.bias.detach()[columns]
        heads = []
        for layer, z in enumerate(seen.heads):
            weight = self.model.output_weight(layer).detach().to(z.dtype)
            written = torch.einsum("thd,hdo->tho", z[row, at], weight)
            constant = torch.zeros_like(written[:, :1])
            if (offset := self.model.output_bias(layer)) is not None:
                constant = constant + offset.detach()
            for scale in map(here, seen.branches[layer]):
                written, constant = scale(written), scale(constant) + scale.bias
            heads.append(logits(written)[0])
            bias = bias + logits(constant)[0, 0]
        feed = torch.stack([logits(part[row : row + 1, at])[0, 0] for part in seen.feedforward])
        start = logits(seen.embedding[row : row + 1, at])[0, 0]
        width = max(len(each) for each in heads)
        padded = torch.stack([nn.functional.pad(each, (0, 0, 0, width - len(each))) for each in heads])
        return LogitParts(columns, padded, feed, start, bias, seen.logits[0, columns])

    def toward(self, seen: Pass, directions: torch.Tensor) -> torch.Tensor:
        """What each head adds along a direction of the unembedding space: ``[layers, batch, tokens, heads]``.

        The direction goes back through the norms instead of each head through them, so that nothing of
        ``[batch, tokens, heads, hidden]`` is held.

        Args:
            seen: of :meth:`run`.
            directions: ``[batch, tokens, hidden]``, rows of the unembedding or differences of them.
        """
        back = _transposed(seen.norm, directions)
        found = torch.zeros(len(seen.heads), *back.shape[:2], self.model.heads, dtype=back.dtype, device=back.device)
        for layer, z in enumerate(seen.heads):
            at_output = reduce(lambda d, scale: _transposed(scale, d), reversed(seen.branches[layer]), back)
            weight = self.model.output_weight(layer).detach().to(z.dtype).flatten(0, 1)
            along = (at_output @ weight.T).unflatten(-1, z.shape[-2:])
            found[layer, ..., : z.shape[-2]] = (along * z).sum(-1)
        return found


@dataclass
class DirectLogit(Score):
    """What each head adds to the logit of the true next token, on average over tokens.

    ``data``: texts, or a task whose batches hold ``input_ids`` (and ``attention_mask``); None takes 64 news items.

    Args:
        centered: less what it adds to the average token's logit, which a softmax does not see.
        max_tokens, batch_size: of texts.

    Example:
        >>> DirectLogit().score(load("gemma-3-270m", lm_head=True), load_texts("ag-news", 16)).top(3)
        [(16, 2), (15, 0), (15, 3)]
    """

    name: ClassVar[str] = "direct-logit"
    summary: ClassVar[str] = "what a head adds to the true next token's logit through the frozen final norm"
    needs: ClassVar[Needs] = "texts"
    higher_means: ClassVar[str] = "raises the logit of the token that comes next"

    centered: bool = True
    max_tokens: int = 128
    batch_size: int = 8

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`. Raises InputError where the model gives no logits or no token has a next one."""
        lens = LogitLens(model)
        task = self._task(data)
        mean = lens.unembedding.float().mean(0) if self.centered else None
        total = torch.zeros(model.layers, model.heads, dtype=torch.float64)
        count = 0
        batches = task.batches(model)
        for done, batch in enumerate(batches, start=1):
            ids = batch.inputs["input_ids"]
            mask = batch.inputs.get("attention_mask", torch.ones_like(ids)).bool()
            seen = lens.run(batch.inputs)
            kept = torch.zeros_like(mask)
            kept[:, :-1] = mask[:, :-1] & mask[:, 1:]
            wanted = lens.unembedding[ids.roll(-1, 1)].to(seen.embedding.dtype)
            found = lens.toward(seen, wanted if mean is None else wanted - mean)
            total += found[:, kept].double().sum(1).cpu()
            count += int(kept.sum())
            if progress is not None:
                progress(done, len(batches))
        if not count:
            raise InputError(f"No token of {task.name} has a next one; expected texts of two tokens or more.")
        values = total / count
        for layer in model.attention_layers:
            values[layer.index, layer.heads :] = torch.nan
        return self._map(values, model, task.name)

    def _task(self, data: Any) -> Task:
        if isinstance(data, Task):
            return data
        if data is None:
            from polyhead.data import load_texts

            return NextToken(load_texts("ag-news", 64), "ag-news", self.max_tokens, self.batch_size)
        if isinstance(data, str) or not all(isinstance(text, str) for text in data):
            raise InputError(f"direct-logit was given {type(data).__name__}, expected a list of texts or a task.")
        return NextToken(data, "texts", self.max_tokens, self.batch_size)


def _transposed(scale: TokenScale, directions: torch.Tensor) -> torch.Tensor:
    """The linear map of a scale, transposed: taking the mean off is symmetric, and comes last here."""
    weighted = scale.token * scale.weight * directions
    return weighted - weighted.mean(-1, keepdim=True) if scale.centers else weighted


@contextmanager
def logits_at(
    head: nn.Module, rows: Sequence[int] | torch.Tensor, positions: Sequence[int] | torch.Tensor
) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """While the block runs, the unembedding works at ``rows, positions`` alone: logits are ``[1, n, vocabulary]``.

    Gives two lists that fill with each call: all states before it, ``[batch, tokens, hidden]``, and its logits.
    """
    given: list[torch.Tensor] = []
    gave: list[torch.Tensor] = []

    def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given.append(args[0])
        at = [torch.as_tensor(index, dtype=torch.long, device=args[0].device) for index in (rows, positions)]
        return (args[0][at[0], at[1]][None], *args[1:])

    before = head.register_forward_pre_hook(choose)
    after = head.register_forward_hook(lambda _, args, output: gave.append(output))
    try:
        yield given, gave
    finally:
        before.remove()
        after.remove()


_Calls = list[tuple[nn.Module, torch.Tensor, torch.Tensor]]


@contextmanager
def _outside_layers(model: HeadedModel, head: nn.Module) -> Iterator[_Calls]:
    """Calls of the modules that are neither in a layer nor the unembedding: embeddings and the final norm."""
    inside = {id(part) for block in blocks_of(model) for part in block.modules()} | {id(head)}
    calls: _Calls = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
            calls.append((module, args[0], output))

    handles = []
    for module in model.module.modules():
        if id(module) not in inside and not any(True for _ in module.children()):
            handles.append(module.register_forward_hook(keep))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
