"""Token attributions by plain means: gradients, leaving one out, attention, and chance to compare them with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.explain.base import Attributor, Readout
from polyhead.headmap import HeadMap
from polyhead.heads.streaming import Pattern, stream_attention

__all__ = ["AttentionRow", "GradientNorm", "GradientXInput", "LeaveOneOut", "RandomScores", "judged_only"]


def judged_only(scores: np.ndarray, judged: np.ndarray | None) -> np.ndarray:
    """The scores ``[tokens]`` in float64, NaN where a token is not judged."""
    found = np.array(scores, dtype=np.float64)
    if judged is not None:
        found[~judged] = np.nan
    return found


@dataclass
class GradientNorm(Attributor):
    """Euclidean norm of the gradient of the target's log-probability by each token's embedding."""

    name = "gradient-norm"

    def attribute(
        self, readout: Readout, ids: torch.Tensor, target: int, judged: np.ndarray | None = None
    ) -> np.ndarray:
        """See :class:`Attributor`; never negative."""
        _, gradient = _gradient(readout, ids, target)
        return judged_only(gradient.norm(dim=-1).cpu().numpy(), judged)


@dataclass
class GradientXInput(Attributor):
    """Gradient of the target's log-probability times the embedding, summed over features: signed."""

    name = "gradient-x-input"

    def attribute(
        self, readout: Readout, ids: torch.Tensor, target: int, judged: np.ndarray | None = None
    ) -> np.ndarray:
        """See :class:`Attributor`."""
        states, gradient = _gradient(readout, ids, target)
        return judged_only((states * gradient).sum(-1).cpu().numpy(), judged)


def _gradient(readout: Readout, ids: torch.Tensor, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and gradient, float64 ``[tokens, hidden]``."""
    with torch.enable_grad():
        states = readout.embed(ids[None]).detach().clone().requires_grad_()
        answer = torch.log_softmax(readout.logits(inputs_embeds=states), -1)[0, target]
        (gradient,) = torch.autograd.grad(answer, states)
    return states[0].detach().double(), gradient[0].double()


@dataclass
class LeaveOneOut(Attributor):
    """How much the target's probability falls when one token is left out.

    Args:
        replacement: token id to put in its place; None shortens the text by the token.
    """

    replacement: int | None = None
    name = "leave-one-out"

    def attribute(
        self, readout: Readout, ids: torch.Tensor, target: int, judged: np.ndarray | None = None
    ) -> np.ndarray:
        """See :class:`Attributor`.

        Raises:
            InputError: a text of one token, of which nothing would be left.
        """
        at = torch.arange(len(ids), device=ids.device)
        if judged is not None:
            at = at[torch.as_tensor(judged, device=ids.device)]
        rows = ids.repeat(len(at), 1)
        if self.replacement is not None:
            rows[torch.arange(len(at), device=ids.device), at] = self.replacement
        elif len(ids) < 2:
            raise InputError("A text of one token cannot be shortened; give LeaveOneOut a replacement.")
        else:
            stays = torch.ones_like(rows, dtype=torch.bool)
            stays[torch.arange(len(at), device=ids.device), at] = False
            rows = rows[stays].view(len(at), -1)
        scores = np.full(len(ids), np.nan)
        if len(at):
            whole = readout.probabilities(ids[None])[0, target]
            scores[at.cpu().numpy()] = (whole - readout.probabilities(rows)[:, target]).double().cpu().numpy()
        return scores


@dataclass
class AttentionRow(Attributor):
    """Attention paid to each token from where the answer is read: the last token, or all tokens of a mean.

    Args:
        weights: of the heads, such as a score's HeadMap: their rows are added up with these weights, divided by the sum
            of absolute weights; heads with NaN do not count. None takes the heads of the last layer alike.

    Example:
        >>> model = load("gemma-3-270m", lm_head=True)
        >>> importance = HeadMap(np.random.rand(model.layers, model.heads))
        >>> found = AttentionRow(importance).text(NextTokenReadout(model), "The capital of France is")
    """

    weights: HeadMap | None = None
    name = "attention-row"

    def attribute(
        self, readout: Readout, ids: torch.Tensor, target: int, judged: np.ndarray | None = None
    ) -> np.ndarray:
        """See :class:`Attributor`; the target does not matter to it.

        Raises:
            InputError: a HeadMap of another shape than the model, or without any weight.
        """
        model = readout.model
        rows = self.per_head(readout, ids)
        if self.weights is None:
            weights = np.zeros(rows.shape[:2])
            weights[-1] = np.isfinite(rows[-1, :, 0])
        else:
            weights = np.nan_to_num(self.weights.values)
        if weights.shape != rows.shape[:2] or not weights.any():
            raise InputError(
                f"AttentionRow was given weights {list(weights.shape)} for '{model.name}' of {model.layers} layers x "
                f"{model.heads} heads; expected a HeadMap of that model with values other than 0."
            )
        found = np.einsum("lh,lht->t", weights, np.nan_to_num(rows)) / np.abs(weights).sum()
        return judged_only(found, judged)

    def per_head(self, readout: Readout, ids: torch.Tensor) -> np.ndarray:
        """Each head's row ``[layers, heads, tokens]`` float64; NaN where a layer has fewer heads."""
        model = readout.model
        reads = readout.reads(len(ids)).to(model.device)
        rows = np.full((model.layers, model.heads, len(ids)), np.nan)

        def visit(pattern: Pattern) -> None:
            row = torch.einsum("q,hqk->hk", reads, pattern.weights[0]).double().cpu().numpy()
            rows[pattern.layer, : len(row)] = row

        inputs = {"input_ids": ids[None].to(model.device), "attention_mask": torch.ones_like(ids)[None]}
        stream_attention(model, inputs, visit)
        return rows


@dataclass
class RandomScores(Attributor):
    """Scores drawn between 0 and 1: what every method has to beat."""

    seed: int = 0
    name = "random"

    def attribute(
        self, readout: Readout, ids: torch.Tensor, target: int, judged: np.ndarray | None = None
    ) -> np.ndarray:
        """See :class:`Attributor`; the same for every text of a length."""
        return judged_only(np.random.default_rng(self.seed).random(len(ids)), judged)
