"""TempScale: sharper or flatter attention, without training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from polyhead.act.base import Action, head_values
from polyhead.attention.tempscale import high_frequency_gain
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.papers import paper
from polyhead.tap import AttentionCall

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["LengthRow", "Temperature", "length_collapse", "length_report"]


@paper("tempscale-length-collapse")
class Temperature(Action):
    """``A = softmax(q k^T / (tau sqrt(d)))``: queries are divided by ``tau`` before attention.

    Below 1 attention is sharper: more of what tells the tokens of a long text apart comes through. A position bias
    that is added to the scores (T5, ALiBi) keeps its size.

    Args:
        tau: one number for all heads, or ``[layers, heads]`` as HeadMap, array or tensor; 1 changes nothing, NaN
            leaves a head alone.

    Example:
        >>> import polyhead, torch
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> with Temperature(0.9).on(model), torch.no_grad():
        ...     _ = model(**model.tokenize(["a long text, usually"]))
    """

    name: ClassVar[str] = "temperature"
    summary: ClassVar[str] = "make attention sharper (below 1) or flatter"

    def __init__(self, tau: float | HeadMap | np.ndarray | torch.Tensor) -> None:
        values = torch.as_tensor(tau.values if isinstance(tau, HeadMap) else tau)
        self.tau = torch.nan_to_num(values.float(), nan=1.0)
        if not bool((self.tau > 0).all()):
            raise InputError("A temperature is not above 0; expected numbers such as 0.9 (sharper) or 1.1 (flatter).")

    @contextmanager
    def on(self, model: HeadedModel) -> Iterator[None]:
        """See :class:`Action`.

        Raises:
            UnreadableModelError: the model does not attend through transformers' attention interface.
        """
        if self.tau.dim():
            head_values(self.tau, model, "temperatures")

        def prepare(layer: int, call: AttentionCall) -> AttentionCall | None:
            tau = self.tau if self.tau.dim() == 0 else self.tau[layer, : call.query.shape[1], None, None]
            if not tau.requires_grad and bool((tau == 1).all()):
                return None
            return replace(call, query=call.query / tau.to(call.query.device, call.query.dtype))

        with model.tap_attention(prepare=prepare):
            yield


@dataclass(frozen=True)
class LengthRow:
    """What a length does to embeddings.

    Attributes:
        tokens: that all texts were cut to.
        cosine: mean over pairs of texts; 1 where all embeddings are one.
        distance: mean distance of unit embeddings to their centroid.
        gain: of each head, the mean :func:`polyhead.attention.tempscale.high_frequency_gain` over texts.
    """

    tokens: int
    cosine: float
    distance: float
    gain: HeadMap


@paper("tempscale-length-collapse")
def length_collapse(
    model: HeadedModel, texts: Sequence[str], lengths: Sequence[int] = (64, 128, 256, 512), *, batch_size: int = 8
) -> dict[int, float]:
    """Mean cosine between the mean-pooled embeddings of all pairs of texts, cut to each length in tokens.

    Texts shorter than the longest length are left out, so that every length is measured on the same texts. It grows
    with length where embeddings collapse. Put :class:`Temperature` on to see what it does.

    Raises:
        InputError: fewer than two texts are long enough.
    """
    enough = _long_enough(model, texts, max(lengths))
    return {length: _spread(_embedded(model, enough, length, batch_size))[0] for length in lengths}


@paper("tempscale-length-collapse")
def length_report(
    model: HeadedModel, texts: Sequence[str], lengths: Sequence[int] = (64, 128, 256, 512), *, batch_size: int = 8
) -> list[LengthRow]:
    """What each length does: cosines, distances to the centroid, and what each head lets through.

    Args:
        model: an encoder; put :class:`Temperature` on to see what it does.
        texts: those shorter than the longest length are left out.
        lengths: in tokens.
        batch_size: texts at once; all heads' attention of a batch is held.

    Returns:
        A row a length, in the order given.

    Raises:
        InputError: fewer than two texts are long enough.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> texts = ["a long text about ships at sea", "another long text, of tax and law"]
        >>> [row.tokens for row in length_report(model, texts, (4, 8))]
        [4, 8]
    """
    enough = _long_enough(model, texts, max(lengths))
    rows = []
    for length in lengths:
        gains: list[torch.Tensor] = []
        cosine, distance = _spread(_embedded(model, enough, length, batch_size, gains))
        values = torch.cat(gains).double().mean(0).numpy()
        gain = HeadMap(values, "high-frequency gain", model.name, f"{length} tokens", "keeps tokens apart")
        rows.append(LengthRow(length, cosine, distance, gain))
    return rows


def _long_enough(model: HeadedModel, texts: Sequence[str], tokens: int) -> list[str]:
    enough = [
        text
        for text in texts
        if model.tokenize([text], truncation=True, max_length=tokens)["input_ids"].shape[1] == tokens
    ]
    if len(enough) < 2:
        raise InputError(f"{len(enough)} of {len(texts)} texts have {tokens} tokens; at least 2 are needed.")
    return enough


def _embedded(
    model: HeadedModel, texts: Sequence[str], length: int, batch_size: int, gains: list[torch.Tensor] | None = None
) -> torch.Tensor:
    """Unit embeddings ``[texts, hidden]`` in float64; ``gains`` gets ``[batch, layers, heads]`` a batch."""
    pooled = []
    for first in range(0, len(texts), batch_size):
        cut = model.tokenize(list(texts[first : first + batch_size]), truncation=True, max_length=length)
        with torch.inference_mode():
            if gains is None:
                states = model(**cut).last_hidden_state.float()
            else:
                with model.record("attention") as recording:
                    states = model(**cut).last_hidden_state.float()
                gains.append(high_frequency_gain(recording.attention.float()))
        mask = cut["attention_mask"][..., None]
        pooled.append((states * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(pooled).double(), dim=-1)


def _spread(unit: torch.Tensor) -> tuple[float, float]:
    """Mean cosine of pairs, and mean distance to the centroid."""
    count = len(unit)
    cosine = float((unit.sum(0).pow(2).sum() - count) / (count * (count - 1)))
    return cosine, float((unit - unit.mean(0)).norm(dim=1).mean())
