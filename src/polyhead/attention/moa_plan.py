"""Spans for the heads of a model as it is: chosen from a profile of what each head would lose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch.nn import functional as F

from polyhead.attention.moa_sparse import ElasticSpan, span_density, spans_at, who_meets
from polyhead.errors import InputError
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.headmap import HeadMap
    from polyhead.heads.needles import Needles
    from polyhead.model import HeadedModel
    from polyhead.tap import AttentionCall

__all__ = ["InfluenceProfile", "SpanPlan", "profile_attention_influence", "search_plan"]

Progress = Callable[[int, "int | None"], None]


@dataclass(frozen=True)
class InfluenceProfile:
    """What each span of each head would cost.

    Attributes:
        losses: ``[lengths, layers, heads, spans]`` nats of loss, to first order, of looking no further back.
        lengths: tokens of the prompts, a row each.
        spans: the candidates.
        sinks: first tokens that stay visible.
        model: it was measured on.
    """

    losses: np.ndarray
    lengths: tuple[int, ...]
    spans: tuple[ElasticSpan, ...]
    sinks: int
    model: str = ""


@paper("moa-sparse")
def profile_attention_influence(
    model: HeadedModel,
    needles: Needles,
    spans: Sequence[ElasticSpan],
    *,
    sinks: int = 4,
    progress: Progress | None = None,
) -> InfluenceProfile:
    """Estimate from gradients what each candidate span would cost each head.

    Leaving out weight ``A_ij`` changes it by ``-A_ij`` and the others of its row by ``A_ik A_ij / (1 - A_ij)``; with
    the gradient ``g`` of the loss that is ``A_ij (sum_k g_ik A_ik - g_ij) / (1 - A_ij)``. A span costs the sum over
    what it leaves out (moa-sparse, section 4.2).

    Args:
        model: a decoder with its language-model head, in float32.
        needles: prompts and the answers whose mean loss a token counts; the paper takes the model's own answers.
        spans: candidates.
        sinks: first tokens that stay visible.
        progress: told prompts done and prompts in all.

    Returns:
        A profile with the mean over the prompts of each length.

    Raises:
        InputError: no candidates, or a model without logits.
    """
    if not spans:
        raise InputError("No spans were given to profile; expected at least one candidate.")
    sums: dict[int, list[np.ndarray]] = {}
    for at, prompt in enumerate(needles.prompts):
        ids = [*prompt.prompt, *prompt.answer[:-1]]
        sums.setdefault(len(prompt.prompt), []).append(_influence(model, ids, prompt.answer, spans, sinks))
        if progress is not None:
            progress(at + 1, len(needles))
    lengths = tuple(sorted(sums))
    losses = np.stack([np.mean(sums[length], 0) for length in lengths])
    return InfluenceProfile(losses, lengths, tuple(spans), sinks, model.name)


def _influence(
    model: HeadedModel, ids: list[int], answer: Sequence[int], spans: Sequence[ElasticSpan], sinks: int
) -> np.ndarray:
    from polyhead.tap import attention_weights, tapped

    seen: list[tuple[AttentionCall, torch.Tensor]] = []

    def watch(call: AttentionCall) -> torch.Tensor:
        leaf = torch.zeros_like(call.output, requires_grad=True)
        seen.append((call, leaf))
        return call.output + leaf

    with torch.enable_grad(), tapped(model.module, watch):
        given = torch.tensor([ids], device=model.device)
        logits = getattr(model(input_ids=given), "logits", None)
        if logits is None:
            raise InputError("A profile needs logits: load the model with load(name, lm_head=True).")
        loss = F.cross_entropy(logits[0, -len(answer) :].float(), torch.tensor(answer, device=logits.device))
        slopes = torch.autograd.grad(loss, [leaf for _, leaf in seen])
    places = torch.arange(len(ids), device=model.device)[None]
    dropped = ~who_meets(spans_at(spans, places + 1), places, places, sinks)[0]
    found = []
    with torch.no_grad():
        for (call, _), slope in zip(seen, slopes, strict=True):
            weights = attention_weights(call)[0].double()
            values = call.value[0].repeat_interleave(len(weights) // call.value.shape[1], 0)
            g = (slope[0].transpose(0, 1) @ values.transpose(1, 2)).double()
            change = weights * ((g * weights).sum(-1, keepdim=True) - g) / (1 - weights).clamp_min(1e-6)
            found.append(torch.einsum("hij,rij->hr", change, dropped.to(change)).cpu().numpy())
    return np.stack(found)


@dataclass(frozen=True)
class SpanPlan:
    """A span for every head of a model.

    Attributes:
        spans: ``[layers][heads]``.
        sinks: first tokens that every head sees.
        cost: what the profile says it costs, nats, summed over its lengths; NaN where none was measured.
    """

    spans: tuple[tuple[ElasticSpan, ...], ...]
    sinks: int = 4
    cost: float = float("nan")

    def density(self, length: int) -> float:
        """Share of causal attention that is left in a text of ``length`` tokens."""
        return float(np.mean([span_density(row, length, self.sinks) for row in self.spans]))

    def to_map(self, length: int) -> HeadMap:
        """Tokens that each head looks back at a length of text."""
        from polyhead.headmap import HeadMap

        values = np.array([[span.at(length) for span in row] for row in self.spans])
        return HeadMap(values, name=f"span at {length} tokens", higher_means="looks further back")

    @contextmanager
    def on(self, model: HeadedModel) -> Iterator[None]:
        """Let heads of ``model`` look back as far as the plan says, and no further, while the block runs.

        Raises:
            InputError: a model of another number of layers or heads.
        """
        from polyhead.tap import additive_mask, tapped

        heads = [layer.heads for layer in model.attention_layers]
        if [len(row) for row in self.spans] != heads:
            raise InputError(
                f"A plan for {[len(row) for row in self.spans]} heads a layer was given; '{model.name}' has {heads}."
            )
        layer_of = {id(layer.module): at for at, layer in enumerate(model.attention_layers)}

        def prepare(call: AttentionCall) -> AttentionCall:
            tokens, keys = call.query.shape[2], call.key.shape[2]
            mask = additive_mask(call)
            if mask is None:
                mask = call.query.new_zeros(1, 1, tokens, keys)
            real = (mask >= 0).any(2)[:, 0]
            places = (real.long().cumsum(1) - 1).clamp_min(0)
            asked = places[:, keys - tokens :]
            met = who_meets(spans_at(self.spans[layer_of[id(call.module)]], asked + 1), asked, places, self.sinks)
            call.mask = mask.masked_fill(~met, torch.finfo(mask.dtype).min)
            return call

        with tapped(model.module, lambda _: None, prepare=prepare):
            yield


@paper("moa-sparse")
def search_plan(profile: InfluenceProfile, budget: float, *, objective: Literal["sum", "worst"] = "sum") -> SpanPlan:
    """The plan of least predicted cost whose mean density keeps within a budget at every length profiled.

    An integer programme with one choice a head (moa-sparse, section 4.3), solved by SciPy's ``milp``.

    Args:
        profile: of the candidates.
        budget: share of causal attention to keep, 0 to 1.
        objective: "sum" of the losses over lengths, or the "worst" of them.

    Raises:
        InputError: another objective, or a budget that no candidate keeps.

    Example:
        >>> losses = np.array([[[[3.0, 0.0], [0.1, 0.0]]]])  # one length, one layer, two heads, two candidates
        >>> plan = search_plan(InfluenceProfile(losses, (64,), (ElasticSpan(8), ElasticSpan(64)), 0), 0.7)
        >>> [span.start for span in plan.spans[0]]
        [64, 8]
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if objective not in ("sum", "worst"):
        raise InputError(f"objective={objective!r} was given; expected 'sum' or 'worst'.")
    lengths, layers, heads, count = profile.losses.shape
    density = np.stack([span_density(profile.spans, length, profile.sinks) for length in profile.lengths])
    if (low := density.min(1).max()) > budget:
        raise InputError(f"A budget of {budget} was given; the candidates keep at least {low:.3f} of attention.")
    units = layers * heads
    losses = profile.losses.reshape(lengths, units * count)
    one_each = np.kron(np.eye(units), np.ones((1, count)))
    shares = np.tile(density, (1, units)) / units
    goal = np.concatenate([losses.sum(0) if objective == "sum" else np.zeros(units * count), [objective == "worst"]])
    rows = [LinearConstraint(_wider(one_each, 0), 1, 1), LinearConstraint(_wider(shares, 0), -np.inf, budget)]
    if objective == "worst":
        rows.append(LinearConstraint(_wider(losses, -1), -np.inf, 0))
    bounds = Bounds(np.append(np.zeros(units * count), -np.inf), np.append(np.ones(units * count), np.inf))
    found = milp(goal, constraints=rows, bounds=bounds, integrality=np.append(np.ones(units * count), 0))
    if found.x is None:
        raise InputError(f"No plan keeps within {budget}: {found.message}")
    picked = found.x[:-1].reshape(units, count).argmax(1)
    spans = [[profile.spans[at] for at in row] for row in picked.reshape(layers, heads)]
    cost = float(profile.losses.reshape(lengths, units, count)[:, np.arange(units), picked].sum())
    return SpanPlan(tuple(tuple(row) for row in spans), profile.sinks, cost)


def _wider(matrix: np.ndarray, last: float) -> np.ndarray:
    return np.concatenate([matrix, np.full((len(matrix), 1), last)], 1)
