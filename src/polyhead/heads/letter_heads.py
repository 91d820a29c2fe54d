"""How a decoder picks an answer's letter (chinchilla-mcq-circuits): which heads write it, and what they compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.logit_lens import LogitLens
from polyhead.heads.streaming import Pattern, stream_attention
from polyhead.papers import paper
from polyhead.tap import AttentionCall

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Choices", "LetterAttribution", "LetterHeads", "SubspaceCompressor", "letter_attribution", "letter_heads"]

Which = Literal["q", "k", "v"]


@dataclass(frozen=True)
class Choices:
    """Multiple-choice prompts of one length; the letter comes after the last token.

    Attributes:
        inputs: of the model, without padding.
        labels: ``[n, options]`` token ids of the letters.
        places: ``[n, options, width]`` token positions of each item: its letter, or letter and text.
        right: ``[n]`` which option is right.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    places: torch.Tensor
    right: torch.Tensor

    def log_probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-probability of each option among the options after the last token, ``[n, options]``."""
        return torch.log_softmax(logits[:, -1].float().gather(1, self.labels), -1)


@dataclass(frozen=True)
class LetterAttribution:
    """What each part adds to the right letter's logit, less the mean of the other letters, over the prompts.

    Attributes:
        heads: of the map, ``[layers, heads]``.
        feedforward: ``[layers]``.
    """

    heads: HeadMap
    feedforward: np.ndarray


@paper("chinchilla-mcq-circuits")
def letter_attribution(model: HeadedModel, choices: Choices) -> LetterAttribution:
    """Direct logit attribution at the last token: through the final norm with its scale held as it was.

    Raises:
        InputError: a model that :class:`~polyhead.heads.logit_lens.LogitLens` cannot take apart.
    """
    lens = LogitLens(model)
    seen = lens.run(choices.inputs)
    rows = lens.unembedding[choices.labels].to(seen.embedding.dtype)  # [n, options, hidden]
    at = torch.arange(len(rows), device=rows.device)
    right = rows[at, choices.right]
    direction = right - (rows.sum(1) - right) / (rows.shape[1] - 1)
    directions = torch.zeros_like(seen.embedding)
    directions[:, -1] = direction
    heads = lens.toward(seen, directions)[:, :, -1].double().mean(1).cpu().numpy()
    for layer in model.attention_layers:
        heads[layer.index, layer.heads :] = np.nan
    feed = [float((seen.norm(part)[:, -1] * direction).sum(-1).double().mean()) for part in seen.feedforward]
    data = f"{len(rows)} prompts of {rows.shape[1]} options"
    head_map = HeadMap(heads, "letter-attribution", model.name, data, "raises the right letter above the others")
    return LetterAttribution(head_map, np.array(feed))


@dataclass(frozen=True)
class LetterHeads:
    """Where heads look from the last token, and what that makes them.

    Attributes:
        right: share of the attention on items that falls on the right one, ``[layers, heads]``.
        single: the largest share that one item has on average, whichever is right.
        evenness: entropy of the shares over that of equal ones.
        items, own: attention on all items, and on the last token itself.
        kinds: "correct letter", "single letter", "uniform", "amplification" or "other", ``[layers][heads]``.
    """

    right: np.ndarray
    single: np.ndarray
    evenness: np.ndarray
    items: np.ndarray
    own: np.ndarray
    kinds: list[list[str]]

    def of_kind(self, kind: str) -> list[tuple[int, int]]:
        """``(layer, head)`` of all heads of a kind."""
        return [(i, j) for i, row in enumerate(self.kinds) for j, name in enumerate(row) if name == kind]


@paper("chinchilla-mcq-circuits")
def letter_heads(model: HeadedModel, choices: Choices, bound: float = 0.5) -> LetterHeads:
    """Sort heads by their attention from the last token (the paper's classes; the bounds are ours).

    A head with at least ``bound`` of its attention on items is a correct-letter head where the right item's share lies
    ``bound`` of the way from chance to 1, else a single-letter head where some item's mean share does, else uniform
    where the shares are at least 0.9 even. One that looks at the last token itself instead is an amplification head.
    """
    n, options, _ = choices.places.shape
    shape = (model.layers, model.heads)
    right, single, evenness, items, own = (np.full(shape, np.nan) for _ in range(5))
    rows = torch.arange(n, device=choices.places.device)

    def visit(pattern: Pattern) -> None:
        last = pattern.weights[:, :, -1].double()  # [n, heads, keys]
        heads, where = last.shape[1], choices.places.flatten(1)[:, None].expand(-1, last.shape[1], -1)
        mass = last.gather(2, where).unflatten(2, choices.places.shape[1:]).sum(-1)  # [n, heads, options]
        share = mass / mass.sum(-1, keepdim=True).clamp(min=1e-30)
        place = (pattern.layer, slice(0, heads))
        right[place] = share[rows, :, choices.right].mean(0).cpu()
        single[place] = share.mean(0).amax(-1).cpu()
        evenness[place] = (-torch.xlogy(share, share).sum(-1).mean(0) / np.log(options)).cpu()
        items[place] = mass.sum(-1).mean(0).cpu()
        own[place] = last[..., -1].mean(0).cpu()

    stream_attention(model, choices.inputs, visit)
    clear = 1 / options + bound * (1 - 1 / options)

    def kind(at: tuple[int, int]) -> str:
        if items[at] < bound:
            return "amplification" if own[at] >= bound else "other"
        if right[at] >= clear:
            return "correct letter"
        if single[at] >= clear:
            return "single letter"
        return "uniform" if evenness[at] >= 0.9 else "other"

    kinds = [[kind((layer, head)) for head in range(model.heads)] for layer in range(model.layers)]
    return LetterHeads(right, single, evenness, items, own, kinds)


@paper("chinchilla-mcq-circuits")
class SubspaceCompressor:
    """Projects queries, keys or values of some heads onto the few directions in which they differ over letters.

    Queries are those of the last token, keys and values those of the items; both as the attention kernel gets them
    (after rotary positions). ``x <- mean + P (x - mean)`` with mean and singular vectors of the prompts of :meth:`fit`.
    Heads that share a key-value head are compressed together.

    Args:
        heads: ``(layer, head)``, such as the correct-letter heads.
        which: "q", "k" or "v".
        rank: directions kept; 0 leaves the mean alone.

    Example:
        >>> def kept(model, heads, choices):  # of a decoder with its language-model head
        ...     return SubspaceCompressor(heads, "q", 3).fit(model, choices).loss_recovered(model, choices)
    """

    def __init__(self, heads: Sequence[tuple[int, int]], which: Which = "q", rank: int = 3) -> None:
        if which not in get_args(Which) or rank < 0 or not heads:
            raise InputError(
                f"which={which!r}, rank={rank}, {len(heads)} heads; expected 'q', 'k' or 'v', heads, a rank."
            )
        self.heads, self.which, self.rank = sorted(set(heads)), which, rank
        self._means: dict[tuple[int, int], torch.Tensor] = {}
        self._bases: dict[tuple[int, int], torch.Tensor] = {}

    def fit(self, model: HeadedModel, choices: Choices) -> SubspaceCompressor:
        """Mean and singular vectors of what the heads get on these prompts."""

        def collect(layer: int, call: AttentionCall) -> None:
            for slot in self._slots(layer, call):
                rows = self._vectors(call, slot, choices).flatten(0, 1).double()
                mean = rows.mean(0)
                _, _, directions = torch.linalg.svd(rows - mean, full_matrices=False)
                self._means[layer, slot], self._bases[layer, slot] = mean, directions

        with torch.no_grad(), model.tap_attention(prepare=collect):
            model(**choices.inputs)
        return self

    @contextmanager
    def on(self, model: HeadedModel, choices: Choices) -> Iterator[None]:
        """Compressed while the block runs on the inputs of ``choices``; several nest."""
        if not self._means:
            raise InputError("The compressor has seen no prompts yet: call fit(model, choices) first.")

        def compress(layer: int, call: AttentionCall) -> AttentionCall | None:
            slots = self._slots(layer, call)
            if not slots:
                return None
            name = {"q": "query", "k": "key", "v": "value"}[self.which]
            changed = getattr(call, name).clone()
            where = self._where(call, choices)
            rows = torch.arange(len(where), device=where.device)[:, None]
            for slot in slots:
                mean, basis = self._means[layer, slot], self._bases[layer, slot][: self.rank]
                moved = self._vectors(call, slot, choices).double() - mean
                changed[rows, slot, where] = (mean + moved @ basis.T @ basis).to(changed.dtype)
            return replace(call, **{name: changed})

        with model.tap_attention(prepare=compress):
            yield

    def loss_recovered(self, model: HeadedModel, choices: Choices) -> float:
        """``(loss at rank 0 - loss) / (loss at rank 0 - loss of the whole model)``: 1 where nothing is lost."""

        def loss() -> float:
            with torch.inference_mode():
                logp = choices.log_probabilities(model(**choices.inputs).logits)
            return -float(logp.gather(1, choices.right[:, None]).double().mean())

        whole = loss()
        with self.on(model, choices):
            compressed = loss()
        rank, self.rank = self.rank, 0
        try:
            with self.on(model, choices):
                nothing = loss()
        finally:
            self.rank = rank
        return (nothing - compressed) / (nothing - whole)

    def _slots(self, layer: int, call: AttentionCall) -> list[int]:
        group = 1 if self.which == "q" else call.query.shape[1] // call.key.shape[1]
        return sorted({head // group for at, head in self.heads if at == layer})

    def _where(self, call: AttentionCall, choices: Choices) -> torch.Tensor:
        if self.which == "q":
            return torch.full((len(choices.places), 1), call.query.shape[2] - 1, device=call.query.device)
        return choices.places.flatten(1)

    def _vectors(self, call: AttentionCall, slot: int, choices: Choices) -> torch.Tensor:
        """``[n, places, head_dim]``."""
        given = {"q": call.query, "k": call.key, "v": call.value}[self.which]
        where = self._where(call, choices)
        return given[torch.arange(len(where), device=where.device)[:, None], slot, where]
