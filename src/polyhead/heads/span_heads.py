"""Heads that look at given spans: at the words of a concept, or at the patches an answer is copied from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Progress, Score
from polyhead.papers import paper
from polyhead.tap import AttentionCall, attention_weights

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = [
    "ConceptHeads",
    "ConceptSample",
    "CopySample",
    "OcrHeads",
    "evidence_tokens",
    "jaccard",
]


@dataclass(frozen=True)
class ConceptSample:
    """One input with the places of several concepts in it.

    Attributes:
        inputs: keyword arguments of the model, a batch of one.
        queries: token positions that attend (image tokens, or the words of a sentence); the decoder's, in
            cross-attention.
        concepts: concept -> token positions of its words; the encoder's, in cross-attention.
    """

    inputs: Mapping[str, torch.Tensor]
    queries: Sequence[int]
    concepts: Mapping[str, Sequence[int]]


@paper("hrv")
@dataclass
class ConceptHeads(Score):
    """Head relevance (hrv): how often a concept is the one a head attends to most.

    On each sample a head gives one point to the concept whose words get the most attention from the queries, averaged
    over the queries and over the concept's words; equal concepts share the point. The paper counts in the
    cross-attention of a diffusion model, where the queries are image tokens: with
    :func:`~polyhead.heads.cross_attention.cross_attention` it is that of an encoder-decoder, else the self-attention
    of a sequence that holds both.

    Args:
        concept: which concept's map :meth:`score` gives.
    """

    name: ClassVar[str] = "concept-heads"
    summary: ClassVar[str] = "how often a head attends to a concept's words more than to other concepts'"
    needs: ClassVar[Any] = "other"
    higher_means: ClassVar[str] = "attends to the concept more often than to the others"

    concept: str = ""

    def score(
        self, model: HeadedModel, data: Sequence[ConceptSample] | None = None, *, progress: Progress | None = None
    ) -> HeadMap:
        """See :class:`Score`; data are :class:`ConceptSample`."""
        found = self.measure(model, data, progress=progress)
        if self.concept not in found:
            raise InputError(f"No concept {self.concept!r} in the samples; there are {', '.join(sorted(found))}.")
        return found[self.concept]

    def measure(
        self, model: HeadedModel, data: Sequence[ConceptSample] | None, *, progress: Progress | None = None
    ) -> dict[str, HeadMap]:
        """A map a concept: the share of samples in which the head gave it the point. Maps sum to 1 over concepts.

        Raises:
            InputError: no samples, samples with other concepts, or a place outside the input.
        """
        if not data or not all(isinstance(one, ConceptSample) for one in data):
            raise InputError("ConceptHeads needs a list of ConceptSample(inputs, queries, concepts).")
        names = sorted(data[0].concepts)
        if len(names) < 2 or any(sorted(one.concepts) != names for one in data):
            raise InputError("Every sample needs places for the same concepts, two or more: heads choose among them.")
        points = np.zeros((len(names), model.layers, model.heads))
        for done, sample in enumerate(data, start=1):
            _check_positions(sample.inputs, sample.queries, [at for one in sample.concepts.values() for at in one])
            spans = [list(sample.concepts[name]) for name in names]

            def visit(layer: int, weights: torch.Tensor, spans: list[list[int]] = spans) -> None:
                mean = torch.stack([weights[:, :, span].double().mean((1, 2)) for span in spans])
                won = (mean == mean.amax(0)).double()
                points[:, layer, : weights.shape[0]] += (won / won.sum(0)).cpu().numpy()

            _stream_rows(model, sample.inputs, sample.queries, visit)
            if progress is not None:
                progress(done, len(data))
        shares = points / len(data)
        data_name = f"{len(data)} samples, {len(names)} concepts"
        return {
            name: HeadMap(share, f"{self.name} {name}", model.name, data_name, self.higher_means)
            for name, share in zip(names, shares, strict=True)
        }


@dataclass(frozen=True)
class CopySample:
    """One input in which an answer is written, with the tokens that show it.

    Attributes:
        inputs: keyword arguments of the model, a batch of one, the answer included.
        steps: positions from which the answer's tokens are predicted, in order.
        answer: token ids of the answer, one a step.
        evidence: positions of the tokens that show the answer: patches (:func:`evidence_tokens`) or words.
        written: token ids the model wrote; None takes its most likely ones, or the answer where it gives no logits.
    """

    inputs: Mapping[str, torch.Tensor]
    steps: Sequence[int]
    answer: Sequence[int]
    evidence: Sequence[int]
    written: Sequence[int] | None = None


@paper("ocr-heads")
@dataclass
class OcrHeads(Score):
    """Copy score over given evidence (ocr-heads): share of the answer copied while looking at it.

    At each step a head scores where the token written is the answer's and the position the head attends to most is
    evidence. With text as evidence it is the retrieval score without the demand that the very token is looked at, so
    image and text heads of one model can be compared (``HeadMap.rank_correlation``, :func:`jaccard`).
    """

    name: ClassVar[str] = "ocr-heads"
    summary: ClassVar[str] = "share of an answer's tokens written while the head looks at the evidence for them"
    needs: ClassVar[Any] = "other"
    higher_means: ClassVar[str] = "looks at the evidence while the answer is written"

    def score(
        self, model: HeadedModel, data: Sequence[CopySample] | None = None, *, progress: Progress | None = None
    ) -> HeadMap:
        """See :class:`Score`; data are :class:`CopySample`.

        Raises:
            InputError: no samples, a place outside the input, or not one answer token a step.
        """
        if not data or not all(isinstance(one, CopySample) for one in data):
            raise InputError("OcrHeads needs a list of CopySample(inputs, steps, answer, evidence).")
        total = np.zeros((model.layers, model.heads))
        for done, sample in enumerate(data, start=1):
            if not sample.answer or len(sample.answer) != len(sample.steps):
                raise InputError(f"A sample has {len(sample.steps)} steps for {len(sample.answer)} answer tokens.")
            _check_positions(sample.inputs, sample.steps, sample.evidence)
            best: dict[int, torch.Tensor] = {}

            def visit(layer: int, weights: torch.Tensor, best: dict[int, torch.Tensor] = best) -> None:
                best[layer] = weights.argmax(-1).cpu()

            outputs = _stream_rows(model, sample.inputs, sample.steps, visit)
            right = torch.tensor(_written(outputs, sample)) == torch.tensor(list(sample.answer))
            evidence = torch.tensor(list(sample.evidence))
            for layer, most in best.items():
                hits = torch.isin(most, evidence) & right
                total[layer, : most.shape[0]] += hits.double().mean(-1).numpy()
            if progress is not None:
                progress(done, len(data))
        return self._map(total / len(data), model, f"{len(data)} samples")


def _written(outputs: Any, sample: CopySample) -> list[int]:
    if sample.written is not None:
        return list(sample.written)
    logits = getattr(outputs, "logits", None)
    return list(sample.answer) if logits is None else logits[0, list(sample.steps)].argmax(-1).tolist()


def _check_positions(inputs: Mapping[str, torch.Tensor], queries: Sequence[int], keys: Sequence[int]) -> None:
    """Refuses places outside what attends and what is attended to, which may be a decoder's and an encoder's."""
    source = next((inputs[key] for key in ("input_ids", "inputs_embeds", "input_features") if key in inputs), None)
    given = ("decoder_input_ids", "decoder_inputs_embeds")
    target = next((inputs[key] for key in given if key in inputs), source)
    if source is None or target is None or source.shape[0] != 1 or target.shape[0] != 1:
        raise InputError("A sample needs input_ids or inputs_embeds of a batch of one.")
    for positions, tensor in ((queries, target), (keys, source)):
        inside = tensor.shape[2] // 2 if tensor is inputs.get("input_features") else tensor.shape[1]
        if not positions or not all(0 <= at < inside for at in positions):
            raise InputError(f"A sample names places {sorted(set(positions))} of an input of {inside} tokens.")


def _stream_rows(model: HeadedModel, inputs: Mapping[str, torch.Tensor], rows: Sequence[int], visit: Any) -> Any:
    """Run the model; ``visit(layer, weights [heads, rows, keys])`` sees only the chosen queries' attention."""
    chosen = list(rows)

    def watch(layer: int, call: AttentionCall) -> None:
        queries, keys = call.query.shape[2], call.key.shape[2]
        mask = call.mask
        if mask is None and queries > 1 and _is_causal(call):
            mask = torch.ones(queries, keys, dtype=torch.bool, device=call.query.device).tril(keys - queries)[
                None, None
            ]
        few = mask if mask is None or mask.shape[2] == 1 else mask[:, :, chosen, :keys]
        kwargs = dict(call.kwargs)
        if isinstance(bias := kwargs.get("position_bias"), torch.Tensor):
            kwargs["position_bias"] = bias[:, :, chosen]
        part = replace(call, query=call.query[:, :, chosen].float(), key=call.key.float(), value=call.value.float())
        visit(layer, attention_weights(replace(part, mask=few, kwargs=kwargs))[0][..., :keys])

    with torch.inference_mode(), model.tap_attention(watch):
        return model(**inputs)


def _is_causal(call: AttentionCall) -> bool:
    causal = call.kwargs.get("is_causal")
    return bool(getattr(call.module, "is_causal", False) if causal is None else causal)


@paper("ocr-heads")
def evidence_tokens(
    boxes: Sequence[tuple[float, float, float, float]],
    grid: tuple[int, int],
    image: tuple[float, float],
    iou: float = 0.1,
) -> list[int]:
    """Patches that show what is in the boxes: intersection over union of patch and box above ``iou``.

    Args:
        boxes: ``(left, top, right, bottom)`` in pixels.
        grid: rows and columns of patches.
        image: height and width in pixels.
        iou: bound.

    Returns:
        Patch numbers, row by row from 0, sorted.

    Example:
        >>> evidence_tokens([(8, 0, 24, 8)], (2, 4), (16, 32))
        [1, 2]
    """
    found = set()
    down, across = image[0] / grid[0], image[1] / grid[1]
    for left, top, right, bottom in boxes:
        if right <= left or bottom <= top:
            raise InputError(f"The box {(left, top, right, bottom)} is empty; expected left, top, right, bottom.")
        for row in range(grid[0]):
            for column in range(grid[1]):
                width = min(right, (column + 1) * across) - max(left, column * across)
                height = min(bottom, (row + 1) * down) - max(top, row * down)
                both = max(0.0, width) * max(0.0, height)
                if both / (down * across + (right - left) * (bottom - top) - both) > iou:
                    found.add(row * grid[1] + column)
    return sorted(found)


@paper("ocr-heads")
def jaccard(first: HeadMap, second: HeadMap, threshold: float = 0.1) -> float:
    """Heads above ``threshold`` in both maps over those above it in either; NaN where there are none."""
    above = [np.nan_to_num(one.values, nan=-np.inf) > threshold for one in (first, second)]
    either = int((above[0] | above[1]).sum())
    return float((above[0] & above[1]).sum() / either) if either else float("nan")
