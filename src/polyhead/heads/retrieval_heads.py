"""Retrieval heads: the heads that look at the very token the model is about to copy from far back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from polyhead.data import load_texts
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Progress, Score
from polyhead.heads.needles import NeedlePrompt, Needles
from polyhead.papers import paper
from polyhead.tap import AttentionCall, attention_weights

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Decoding", "RetrievalHeads", "RetrievalResult", "most_attended", "needle_log_probability"]


class Decoding:
    """A prompt read once, then continued token by token or several at a time; keys are kept as the model keeps them.

    Args:
        model: a decoder.
        prompt: token ids; all but the last are read here.

    Raises:
        InputError: a model that is no causal decoder.
    """

    def __init__(self, model: HeadedModel, prompt: Sequence[int]) -> None:
        if not all(getattr(layer.module, "is_causal", True) for layer in model.attention_layers):
            raise InputError(
                f"'{model.name}' attends in both directions and writes nothing: expected a decoder, such as "
                'polyhead.load("gemma-3-270m", lm_head=True).'
            )
        self.model, self.position = model, len(prompt) - 1
        self._logits = "logits_to_keep" in inspect.signature(model.module.forward).parameters
        self.cache: Any = None
        with torch.inference_mode():
            if self.position:
                self._forward(torch.tensor([list(prompt[:-1])]), keep=1)

    def step(self, ids: torch.Tensor) -> Any:
        """The model's outputs for the next tokens ``[batch, n]``."""
        with torch.inference_mode():
            outputs = self._forward(ids, keep=ids.shape[1])
        self.position += ids.shape[1]
        return outputs

    def repeat(self, times: int) -> None:
        """Go on with ``times`` copies of what was read, as a batch."""
        if self.cache is not None:
            self.cache.batch_repeat_interleave(times)

    def _forward(self, ids: torch.Tensor, keep: int) -> Any:
        few = {"logits_to_keep": keep} if self._logits else {}
        outputs = self.model(
            input_ids=ids.to(self.model.device), past_key_values=self.cache, use_cache=True, return_dict=True, **few
        )
        self.cache = getattr(outputs, "past_key_values", None)
        if self.cache is None:
            raise InputError(f"'{self.model.name}' keeps no keys and values between steps; expected a decoder.")
        return outputs


def most_attended(call: AttentionCall, total: int) -> torch.Tensor:
    """The position each query attends to most, ``[batch, heads, queries]``, in float32 whatever the model's.

    Args:
        call: of a step with few queries.
        total: tokens up to and with the call's; a sliding window's keys are the last of them.
    """
    query, key, value = call.query.float(), call.key.float(), call.value.float()
    weights = attention_weights(replace(call, query=query, key=key, value=value))[..., : key.shape[2]]
    return weights.argmax(-1) + (total - key.shape[2])


@dataclass(frozen=True)
class RetrievalResult:
    """What every head did on every prompt.

    Attributes:
        scores: float64 ``[prompts, layers, heads]``: share of the needle's distinct tokens that the head copied.
        recall: ``[prompts]``: share of the answer's tokens that the model wrote (its most likely ones, given the true
            ones before where teacher-forced; NaN for a model without logits).
        model, data: names.
    """

    scores: np.ndarray
    recall: np.ndarray
    model: str
    data: str

    def to_map(self) -> HeadMap:
        """Mean score over the prompts."""
        score = RetrievalHeads
        return HeadMap(self.scores.mean(0), score.name, self.model, self.data, score.higher_means)

    def share_above(self, threshold: float = 0.1) -> float:
        """Share of all heads that are retrieval heads, by the paper's bound on the mean score."""
        mean = self.scores.mean(0)
        return float((mean[np.isfinite(mean)] > threshold).mean())

    def frequency(self) -> HeadMap:
        """Share of the prompts in which a head copied at least one token."""
        active = np.where(np.isnan(self.scores), np.nan, self.scores > 0).mean(0)
        return HeadMap(active, "retrieval-frequency", self.model, self.data, "copies in more of the prompts")


@paper("retrieval-heads")
@dataclass
class RetrievalHeads(Score):
    """Retrieval score (Wu et al. 2024, retrieval-heads, section 2): ``|tokens of the needle copied| / |its tokens|``.

    A head copies a token when, at the step that writes it, the head's most attended position lies in the needle and
    holds that token. The mean over prompts is the score. The prompt is read once; only the attention rows of the
    tokens being written are ever computed.

    Args:
        mode: "greedy" (the default, the paper's): the model writes its own most likely tokens. "teacher-forced": it
            is given the true answer, which also measures heads of a model that recalls little, and needs no logits.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("gemma-3-270m", lm_head=True)
        >>> needles = Needles.build(model.tokenizer, load_texts("ag-news", 400), lengths=(256,))
        >>> result = RetrievalHeads().measure(model, needles)
        >>> heads = result.to_map().top(4)
    """

    name: ClassVar[str] = "retrieval-heads"
    summary: ClassVar[str] = "share of a hidden fact's tokens that the head looks at while the model copies them"
    needs: ClassVar[Any] = "needles"
    higher_means: ClassVar[str] = "copies more of a needle from the context"

    mode: Literal["greedy", "teacher-forced"] = field(default="greedy")

    def score(self, model: HeadedModel, data: Needles | None = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; without data, ten needles in news texts of 256 and 512 tokens."""
        return self.measure(model, data, progress=progress).to_map()

    def measure(
        self, model: HeadedModel, data: Needles | None = None, *, progress: Progress | None = None
    ) -> RetrievalResult:
        """The score of every prompt, and how much the model recalled.

        Raises:
            InputError: data that are no needles, a model that is no decoder, or greedy without logits.
        """
        if self.mode not in ("greedy", "teacher-forced"):
            raise InputError(f"mode is {self.mode!r}, expected 'greedy' or 'teacher-forced'.")
        if data is None:
            data = Needles.build(model.tokenizer, load_texts("ag-news", 400))
        if not isinstance(data, Needles):
            raise InputError(f"RetrievalHeads was given {type(data).__name__}; expected Needles (Needles.build).")
        found = []
        for done, prompt in enumerate(data.prompts, start=1):
            found.append(self._one(model, prompt))
            if progress is not None:
                progress(done, len(data))
        scores, recall = (np.stack(parts) for parts in zip(*found, strict=True))
        return RetrievalResult(scores, recall, model.name, data.name)

    def _one(self, model: HeadedModel, prompt: NeedlePrompt) -> tuple[np.ndarray, np.ndarray]:
        decoding = Decoding(model, prompt.prompt)
        best: dict[int, list[torch.Tensor]] = {}
        written: list[int] = []
        likely: list[int] = []

        def watch(layer: int, call: AttentionCall) -> None:
            best.setdefault(layer, []).append(most_attended(call, decoding.position + call.query.shape[2])[0])

        with model.tap_attention(watch):
            if self.mode == "teacher-forced":
                ids = [prompt.prompt[-1], *prompt.answer[:-1]]
                likely = _most_likely(decoding.step(torch.tensor([ids])))
                written = list(prompt.answer)
            else:
                for _ in prompt.answer:
                    last = written[-1] if written else prompt.prompt[-1]
                    likely = _most_likely(decoding.step(torch.tensor([[last]])))
                    if not likely:
                        raise InputError(
                            "Greedy retrieval scores need logits: load the model with load(name, lm_head=True), or use "
                            "RetrievalHeads(mode='teacher-forced')."
                        )
                    written += likely
                likely = written
        recall = np.mean(np.array(likely) == np.array(prompt.answer)) if likely else np.nan
        return _copied(model, best, written, prompt), np.asarray(recall, dtype=np.float64)


def _most_likely(outputs: Any) -> list[int]:
    logits = getattr(outputs, "logits", None)
    return [] if logits is None else logits[0].argmax(-1).tolist()


def _copied(
    model: HeadedModel, best: dict[int, list[torch.Tensor]], written: Sequence[int], prompt: NeedlePrompt
) -> np.ndarray:
    first, end = prompt.needle
    tokens = set(prompt.prompt[first:end])
    scores = np.full((model.layers, model.heads), np.nan)
    for layer, rows in best.items():
        for head, positions in enumerate(torch.cat(rows, dim=-1).tolist()):
            hits = {
                token
                for position, token in zip(positions, written, strict=True)
                if first <= position < end and prompt.prompt[position] == token
            }
            scores[layer, head] = len(hits) / len(tokens)
    return scores


@paper("retrieval-heads")
def needle_log_probability(
    model: HeadedModel,
    needles: Needles,
    off: Sequence[Sequence[tuple[int, int]]],
    *,
    progress: Progress | None = None,
) -> np.ndarray:
    """Log-probability of every answer with each of several sets of heads switched off, float64 ``[sets, prompts]``.

    The heads are off (their output is 0) at the steps that write the answer; the prompt is read once, with all heads,
    and shared by the sets, which run as one batch. An empty set gives the model as it is.

    Args:
        model: a decoder with its language-model head.
        needles: prompts.
        off: sets of ``(layer, head)``.
        progress: told the prompts done.

    Raises:
        InputError: no sets, a head the model does not have, or a model without logits.
    """
    gates = torch.ones(len(off), model.layers, model.heads, device=model.device)
    for row, heads in enumerate(off):
        for layer, head in heads:
            if not (0 <= layer < model.layers and 0 <= head < model.attention_layers[layer].heads):
                raise InputError(f"Head {head} of layer {layer} was named; '{model.name}' has no such head.")
            gates[row, layer, head] = 0
    if not off:
        raise InputError("No sets of heads were given; expected at least one (an empty set is the model as it is).")
    found = np.empty((len(off), len(needles)))
    for column, prompt in enumerate(needles.prompts):
        decoding = Decoding(model, prompt.prompt)
        decoding.repeat(len(off))
        ids = torch.tensor([[prompt.prompt[-1], *prompt.answer[:-1]]]).repeat(len(off), 1)
        with _gated_rows(model, gates):
            logits = getattr(decoding.step(ids), "logits", None)
        if logits is None:
            raise InputError("Log-probabilities need logits: load the model with load(name, lm_head=True).")
        answer = torch.tensor(prompt.answer, device=model.device).expand(len(off), -1)[..., None]
        found[:, column] = torch.log_softmax(logits.float(), -1).gather(-1, answer).sum((1, 2)).double().cpu().numpy()
        if progress is not None:
            progress(column + 1, len(needles))
    return found


@contextmanager
def _gated_rows(model: HeadedModel, gates: torch.Tensor) -> Iterator[None]:
    """Each row of a batch under gates of its own, ``[rows, layers, heads]``."""

    def change(layer: int, heads: torch.Tensor) -> torch.Tensor:
        return heads * gates[:, layer, None, : heads.shape[-2], None].to(heads.dtype)

    with model.tap_heads(change):
        yield
