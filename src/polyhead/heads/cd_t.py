"""Contextual decomposition: the part of a model's output that is due to chosen tokens or heads, carried exactly."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Progress, Score
from polyhead.heads.split_tensor import SplitTensor, activations_split
from polyhead.papers import paper
from polyhead.recording import blocks_of

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["ContextualDecomposer", "ContextualDecomposition", "Decomposition"]

Inputs = dict[str, torch.Tensor]
Readout = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Decomposition:
    """What a readout of the model gave, in two parts of one shape: ``relevant + irrelevant`` is the readout."""

    relevant: torch.Tensor
    irrelevant: torch.Tensor

    @property
    def total(self) -> torch.Tensor:
        """The readout itself."""
        return self.relevant + self.irrelevant


def _output(outputs: Any) -> torch.Tensor:
    logits = getattr(outputs, "logits", None)
    return outputs.last_hidden_state if logits is None else logits


@paper("cd-t")
class ContextualDecomposer:
    """Contextual decomposition carried through a Transformer (Hsu et al., cd-t, section 3).

    The model runs its own code; token states travel in two parts by these rules, and the parts sum to the state:

    * linear layer: ``W rel`` and ``W irrel``, the bias shared in proportion to ``|W rel|`` and ``|W irrel|``;
    * activation: ``irrel' = act(irrel)``, ``rel' = act(rel + irrel) - act(irrel)``, and likewise for gated products;
    * norm: both parts by the deviation of the whole, the bias shared;
    * attention: probabilities of the whole, held fixed; the values are decomposed;
    * where the parts of a sum have opposite signs, the larger takes it all.

    What is not derived from the chosen tokens or heads is irrelevant. No model class is named: a torch function that
    the rules don't cover is refused by name.

    Args:
        model: any; encoders, decoders, grouped heads, gated feed-forward blocks.
        readout: of the model's outputs, linear or by the operations above; the logits, or the last hidden state, where
            None. ``lambda outputs: outputs.logits[:, -1]``.
        baseline: ``[layers, heads, head_dim]`` of every head that stays irrelevant when the head is chosen, such as its
            mean output; zero where None.
        cancel: the last rule; without it parts may grow apart, but stay closer to what a small change would do.
        forward: further arguments of every forward pass, such as ``logits_to_keep=1``.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> decomposer = ContextualDecomposer(model, lambda outputs: outputs.last_hidden_state.mean(1))
        >>> inputs = model.tokenize(["A man is playing a guitar."])
        >>> part = decomposer.from_tokens(inputs, [6])
        >>> part.relevant.shape
        torch.Size([1, 384])
    """

    def __init__(
        self,
        model: HeadedModel,
        readout: Readout | None = None,
        *,
        baseline: torch.Tensor | None = None,
        cancel: bool = True,
        **forward: Any,
    ) -> None:
        self.model = model
        self.baseline = baseline
        self.cancel = cancel
        self.readout = readout or _output
        self.forward = forward

    def from_tokens(self, inputs: Inputs, tokens: Sequence[int] | torch.Tensor) -> Decomposition:
        """The part due to the embeddings of some tokens.

        Args:
            inputs: of the model, ``[batch, tokens]``.
            tokens: positions, the same in every row, or booleans ``[batch, tokens]``.
        """
        length = next(iter(inputs.values())).shape[1]
        chosen = torch.as_tensor(tokens)
        if chosen.dtype != torch.bool:
            if chosen.numel() and not (int(chosen.min()) >= 0 and int(chosen.max()) < length):
                raise InputError(f"Tokens {chosen.tolist()} were named; the text has tokens 0 to {length - 1}.")
            chosen = torch.zeros(1, length, dtype=torch.bool).index_fill(1, chosen.long(), True)
        mask = chosen[..., None].to(self.model.device)

        def enter(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            states = args[0] if args else kwargs["hidden_states"]
            split = SplitTensor.of(states * mask, states * ~mask)
            return ((split, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": split})

        handle = blocks_of(self.model)[0].register_forward_pre_hook(_once(enter), with_kwargs=True)
        try:
            return self._run(inputs)
        finally:
            handle.remove()

    def from_heads(self, inputs: Inputs, heads: Sequence[tuple[int, int]]) -> Decomposition:
        """The part due to the outputs of some ``(layer, head)``, all tokens.

        Raises:
            InputError: a head the model does not have.
        """
        with self._sources(self._gates(heads)[None]):
            return self._run(inputs)

    def each_head(self, inputs: Inputs, layer: int) -> torch.Tensor:
        """Relevant part of the readout for each head of a layer on its own, ``[heads, batch, ...]``, in one pass."""
        count = self.model.attention_layers[layer].heads
        gates = torch.stack([self._gates([(layer, head)]) for head in range(count)])
        rows = len(next(iter(inputs.values())))
        several = {key: value.repeat(count, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
        with self._sources(gates.repeat_interleave(rows, 0)):
            return self._run(several).relevant.unflatten(0, (count, rows))

    def to_heads(self, inputs: Inputs, source: tuple[int, int]) -> np.ndarray:
        """How much of each later head's output is due to a head: ``|rel| / (|rel| + |irrel|)``, ``[layers, heads]``.

        L1 sizes over all real tokens; 0 for heads that don't lie above the source.
        """
        found = np.zeros((self.model.layers, self.model.heads))
        mask = inputs.get("attention_mask")

        def reach(layer: int, z: torch.Tensor) -> None:
            if layer > source[0] and isinstance(z, SplitTensor):
                sizes = [part.abs().sum(-1) for part in (z.relevant, z.irrelevant)]
                kept = [size if mask is None else size * mask[..., None] for size in sizes]
                one, other = (size.sum((0, 1)).double() for size in kept)
                found[layer, : len(one)] = (one / (one + other).clamp(min=1e-30)).cpu().numpy()

        with self._sources(self._gates([source])[None]), self.model.tap_heads(reach):
            self._run(inputs)
        return found

    def _gates(self, heads: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Booleans ``[layers, heads]``."""
        gates = torch.zeros(self.model.layers, self.model.heads, dtype=torch.bool)
        for layer, head in heads:
            layers = self.model.attention_layers
            if not (0 <= layer < len(layers) and 0 <= head < layers[layer].heads):
                raise InputError(
                    f"Head {head} of layer {layer} was named; '{self.model.name}' has layers 0 to {len(layers) - 1} of "
                    f"up to {self.model.heads} heads."
                )
            gates[layer, head] = True
        return gates

    @contextmanager
    def _sources(self, gates: torch.Tensor) -> Iterator[None]:
        """Make the outputs of chosen heads relevant, whole; gates ``[1 or batch, layers, heads]``."""

        def mark(layer: int, z: torch.Tensor) -> torch.Tensor | None:
            if not bool(gates[:, layer].any()):
                return None
            gate = gates[:, layer, : z.shape[-2]].to(z.device)[:, None, :, None]
            relevant = z.relevant if isinstance(z, SplitTensor) else torch.zeros_like(z)
            irrelevant = z.irrelevant if isinstance(z, SplitTensor) else z
            moved = irrelevant if self.baseline is None else irrelevant - self.baseline[layer, : z.shape[-2]].to(z)
            return SplitTensor.of(relevant + moved * gate, irrelevant - moved * gate)

        with self.model.tap_heads(mark):
            yield

    def _run(self, inputs: Inputs) -> Decomposition:
        extra = {"use_cache": False} if getattr(self.model.config, "use_cache", None) else {}
        with ExitStack() as stack:
            stack.enter_context(activations_split(self.model.module, self.cancel))
            stack.enter_context(torch.no_grad())
            result = self.readout(self.model(**inputs, **extra, **self.forward))
        if isinstance(result, SplitTensor):
            return Decomposition(result.relevant, result.irrelevant)
        return Decomposition(torch.zeros_like(result), result)


def _once(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook that works the first time only: layers may share one block."""
    done: list[bool] = []

    def first(*args: Any) -> Any:
        if done:
            return None
        done.append(True)
        return hook(*args)

    return first


@paper("cd-t")
@dataclass
class ContextualDecomposition(Score):
    """How much of the model's output is due to each head, by contextual decomposition.

    The output is the mean-pooled embedding of an encoder, and the logits after the last token, centred over the
    vocabulary, of a decoder. A head's value is the mean over texts of ``|<rel, y>| / <y, y>``, the share of the output
    ``y`` that its relevant part makes up along ``y``.

    Args:
        max_tokens: texts are cut there.
        batch_size: texts a batch; each pass holds a batch once for every head of a layer.
    """

    name: ClassVar[str] = "cd-t"
    summary: ClassVar[str] = "share of the output that is due to each head, decomposed exactly"
    needs: ClassVar[Any] = "texts"
    higher_means: ClassVar[str] = "more of the output is due to the head"

    max_tokens: int = 64
    batch_size: int = 4

    def score(
        self, model: HeadedModel, data: Sequence[str] | None = None, *, progress: Progress | None = None
    ) -> HeadMap:
        """See the class; the first 64 texts of AG News where ``data`` is None."""
        from polyhead.data import load_texts

        texts = load_texts("ag-news", 64) if data is None else list(data)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"'{self.name}' needs a list of texts, got {texts!r:.80}.")
        total, cut = np.zeros((model.layers, model.heads)), 0
        for first in range(0, len(texts), self.batch_size):
            some = texts[first : first + self.batch_size]
            cut += sum(len(ids) > self.max_tokens for ids in model.tokenizer(some)["input_ids"])
            total += self.batch_shares(model, model.tokenize(some, truncation=True, max_length=self.max_tokens))
            if progress is not None:
                progress(min(first + self.batch_size, len(texts)), len(texts))
        words = f"{len(texts)} texts" + (f", {cut} cut at {self.max_tokens} tokens" if cut else "")
        return self._map(total / len(texts), model, words)

    def batch_shares(self, model: HeadedModel, inputs: Inputs) -> np.ndarray:
        """Shares ``[layers, heads]`` summed over the rows of a batch."""
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        weights = mask / mask.sum(1, keepdim=True)

        # Logits of the last tokens only: those of all tokens of all heads would fill the memory.
        last, place = (mask.shape[1] - 1 - mask.flip(1).argmax(1)).unique(return_inverse=True)
        keep = "logits_to_keep" in inspect.signature(model.module.forward).parameters
        at = place if keep else last[place]

        def readout(outputs: Any) -> torch.Tensor:
            times = len(_output(outputs)) // len(mask)
            if getattr(outputs, "logits", None) is None:
                states = outputs.last_hidden_state
                return (states * weights.repeat(times, 1)[..., None].to(states.dtype)).sum(1)
            return outputs.logits[torch.arange(times * len(mask)), at.repeat(times)]

        def centred(values: torch.Tensor) -> torch.Tensor:
            wide = values.float() if values.dtype.itemsize < 4 else values
            return wide - wide.mean(-1, keepdim=True) if hasattr(model.module, "lm_head") else wide

        decomposer = ContextualDecomposer(model, readout, **({"logits_to_keep": last} if keep else {}))
        values = np.zeros((model.layers, model.heads))
        y = centred(decomposer._run(inputs).total)
        for layer in range(model.layers):
            relevant = centred(decomposer.each_head(inputs, layer))
            share = (relevant * y).sum(-1).abs() / y.square().sum(-1).clamp(min=1e-30)
            values[layer, : len(share)] = share.sum(1).double().cpu().numpy()
        return values
