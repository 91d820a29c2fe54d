"""How faithful token scores are: what becomes of the answer when the tokens they name are taken away or kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from polyhead.errors import InputError

__all__ = [
    "Curve",
    "average_drop",
    "deletion_curve",
    "hellinger",
    "insertion_curve",
    "soft_comprehensiveness",
    "soft_sufficiency",
    "strengths",
]

Probability = Callable[[torch.Tensor], torch.Tensor]
"""``ids [rows, tokens] -> probability of the explained answer [rows]``."""
Predict = Callable[[torch.Tensor], torch.Tensor]
"""``states [rows, tokens, hidden] -> probabilities of all answers [rows, classes]``."""
Scale = Literal["minmax", "rank", "none"]


@dataclass(frozen=True)
class Curve:
    """Probability of the answer while tokens are taken away or put back.

    Attributes:
        fractions: ``[points]`` of the judged tokens changed, 0 to 1.
        probabilities: ``[points]``.
    """

    fractions: np.ndarray
    probabilities: np.ndarray

    @property
    def auc(self) -> float:
        """Area under the curve by trapezoids, 0 to 1."""
        return float(np.trapezoid(self.probabilities, self.fractions))


def deletion_curve(
    probability: Probability,
    ids: torch.Tensor,
    scores: np.ndarray,
    replacement: int | torch.Tensor,
    *,
    points: int | None = None,
) -> Curve:
    """Replace the tokens of one text, highest score first: a faithful score makes the curve fall fast (low AUC).

    Args:
        probability: ``ids [rows, tokens] -> [rows]``.
        ids: ``[tokens]``.
        scores: ``[tokens]``; tokens with NaN stay.
        replacement: a token id, or ids ``[tokens]`` to replace with.
        points: of the curve, both ends included; None for one more than there are tokens.

    Example:
        >>> weight = torch.tensor([0.6, 0.3, 0.1])  # the answer is the sum of the tokens that are left
        >>> curve = deletion_curve(lambda ids: (ids > 0) @ weight, torch.tensor([5, 5, 5]), weight.numpy(), 0)
        >>> curve.probabilities.round(2).tolist()
        [1.0, 0.4, 0.1, 0.0]
    """
    return _curve(probability, ids, scores, replacement, points, insert=False)


def insertion_curve(
    probability: Probability,
    ids: torch.Tensor,
    scores: np.ndarray,
    replacement: int | torch.Tensor,
    *,
    points: int | None = None,
) -> Curve:
    """Begin with every judged token replaced and put them back, highest score first: high AUC is faithful.

    Arguments as of :func:`deletion_curve`.
    """
    return _curve(probability, ids, scores, replacement, points, insert=True)


def average_drop(
    probability: Probability,
    ids: torch.Tensor,
    scores: np.ndarray,
    replacement: int | torch.Tensor,
    *,
    keep: float = 0.5,
) -> float:
    """Share of the probability lost when only the highest-scored tokens are kept, at least 0: lower is better.

    ``max(0, p - p') / p``, averaged over texts where ``ids`` and ``scores`` have several rows.

    Args:
        probability: ``ids [rows, tokens] -> [rows]``.
        ids: ``[tokens]`` or ``[texts, tokens]``.
        scores: of the same shape; tokens with NaN stay.
        replacement: a token id, or ids of the shape of ``ids``.
        keep: share of the judged tokens kept, rounded up.
    """
    rows, values = torch.atleast_2d(ids), np.atleast_2d(np.asarray(scores, dtype=np.float64))
    if rows.shape != values.shape or not 0 <= keep <= 1:
        raise InputError(
            f"average_drop was given ids {list(ids.shape)}, scores {list(values.shape)} and keep={keep}; expected two "
            "of one shape and a share between 0 and 1."
        )
    others = _replacement(rows, replacement)
    changed = rows.clone()
    for row, scored in enumerate(values):
        order = _order(scored)
        gone = torch.as_tensor(order[int(np.ceil(keep * len(order))) :], device=ids.device)
        changed[row, gone] = others[row, gone]
    before, after = probability(rows).double(), probability(changed).double()
    return float(((before - after).clamp(min=0) / before.clamp(min=1e-30)).mean())


def soft_sufficiency(
    predict: Predict,
    states: torch.Tensor,
    scores: np.ndarray,
    *,
    target: int | None = None,
    scale: Scale = "minmax",
    samples: int = 8,
    seed: int = 0,
) -> float:
    """Normalised soft sufficiency (Soft-NS): how much of the answer is left when tokens are kept by their scores.

    Each element of a token's embedding is kept with the token's strength as probability, else set to 0. With ``S = 1 -
    distance(original, perturbed)`` and ``S0`` the same with all judged embeddings at 0, it is ``max(0, S - S0) / (1 -
    S0)``, averaged over samples. The distance is Hellinger's between whole distributions (reagent), or, where
    ``target`` is given, the fall of that class's probability (Zhao and Aletras 2023, for classifiers).

    Args:
        predict: ``states [rows, tokens, hidden] -> probabilities [rows, classes]``.
        states: ``[tokens, hidden]``, the text's embeddings.
        scores: ``[tokens]``; tokens with NaN stay whole.
        target: class whose probability counts; None for the Hellinger distance of all.
        scale: how scores become strengths, see :func:`strengths`.
        samples: perturbed copies.
        seed: of the perturbation.
    """
    kept = strengths(scores, scale)
    distance, nothing = _soft(predict, states, scores, kept, target, samples, seed)
    left = np.maximum(0.0, (1 - distance) - (1 - nothing))
    return float(left.mean() / nothing) if nothing > 0 else 0.0


def soft_comprehensiveness(
    predict: Predict,
    states: torch.Tensor,
    scores: np.ndarray,
    *,
    target: int | None = None,
    scale: Scale = "minmax",
    samples: int = 8,
    seed: int = 0,
) -> float:
    """Normalised soft comprehensiveness (Soft-NC): how much of the answer goes when tokens are removed by their scores.

    As :func:`soft_sufficiency`, with elements kept with probability ``1 - strength``: ``distance / (1 - S0)``.
    Higher is better; 1 is as much as removing everything does.
    """
    kept = 1 - strengths(scores, scale)
    distance, nothing = _soft(predict, states, scores, kept, target, samples, seed)
    return float(distance.mean() / nothing) if nothing > 0 else 0.0


def strengths(scores: np.ndarray, scale: Scale = "minmax") -> np.ndarray:
    """Scores as probabilities ``[tokens]`` between 0 and 1; NaN stays.

    Args:
        scores: ``[tokens]``.
        scale: "minmax" stretches them from 0 to 1; "rank" takes ``(rank - 0.5) / n``, so that every method perturbs
            the same amount and only the order counts; "none" takes them as they are.
    """
    from scipy.stats import rankdata

    values = np.array(scores, dtype=np.float64)
    known = np.isfinite(values)
    found = values[known]
    if scale == "rank":
        values[known] = (rankdata(found) - 0.5) / max(1, len(found))
    elif scale == "minmax":
        width = np.ptp(found) if len(found) else 0.0
        values[known] = (found - found.min()) / width if width > 0 else 0.5
    elif scale != "none":
        raise InputError(f"scale is {scale!r}, expected 'minmax', 'rank' or 'none'.")
    elif ((found < 0) | (found > 1)).any():
        raise InputError("scale 'none' needs scores between 0 and 1; take 'minmax' or 'rank' for others.")
    return values


def hellinger(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Hellinger distance of distributions ``[..., classes]``: 0 the same, 1 disjoint."""
    return (first.double().sqrt() - second.double().sqrt()).norm(dim=-1) / 2**0.5


def _soft(
    predict: Predict,
    states: torch.Tensor,
    scores: np.ndarray,
    kept: np.ndarray,
    target: int | None,
    samples: int,
    seed: int,
) -> tuple[np.ndarray, float]:
    """Distances ``[samples]`` of perturbed copies from the original, and that of a text without judged tokens."""
    if states.dim() != 2 or len(states) != len(scores) or samples < 1:
        raise InputError(
            f"Soft metrics need states [tokens, hidden], one score a token and at least one sample; got "
            f"{list(states.shape)}, {len(scores)} scores and samples={samples}."
        )
    generator = torch.Generator().manual_seed(seed)
    judged = torch.as_tensor(np.isfinite(scores))
    chance = torch.as_tensor(np.where(np.isfinite(kept), kept, 1.0))[:, None]
    draws = torch.rand((samples, *states.shape), generator=generator, dtype=torch.float64) < chance
    empty = (~judged)[:, None].expand(states.shape)
    masks = torch.cat([torch.ones(1, *states.shape, dtype=torch.bool), empty[None], draws])
    answers = predict(states[None] * masks.to(device=states.device, dtype=states.dtype)).double()
    if target is None:
        distances = hellinger(answers[:1], answers[1:])
    else:
        distances = (answers[0, target] - answers[1:, target]).clamp(min=0)
    found = distances.cpu().numpy()
    return found[1:], float(found[0])


def _curve(
    probability: Probability,
    ids: torch.Tensor,
    scores: np.ndarray,
    replacement: int | torch.Tensor,
    points: int | None,
    insert: bool,
) -> Curve:
    if ids.dim() != 1 or len(ids) != len(scores):
        raise InputError(f"A curve needs ids [tokens] and as many scores, got {list(ids.shape)} and {len(scores)}.")
    order = _order(np.asarray(scores, dtype=np.float64))
    if len(order) == 0 or (points is not None and points < 2):
        raise InputError(f"A curve needs a token with a score and at least 2 points; got {len(order)} and {points}.")
    whole = np.linspace(0, len(order), len(order) + 1 if points is None else points)
    counts = np.unique(np.round(whole).astype(int))
    others = _replacement(ids, replacement)
    rows = []
    for count in counts:
        gone = torch.as_tensor((order[count:] if insert else order[:count]).copy(), device=ids.device)
        row = ids.clone()
        row[gone] = others[gone]
        rows.append(row)
    return Curve(counts / len(order), probability(torch.stack(rows)).double().cpu().numpy())


def _order(scores: np.ndarray) -> np.ndarray:
    """Positions of judged tokens, highest score first, ties to the earlier token."""
    order = np.argsort(-np.where(np.isfinite(scores), scores, -np.inf), kind="stable")
    return order[: int(np.isfinite(scores).sum())]


def _replacement(ids: torch.Tensor, replacement: int | torch.Tensor) -> torch.Tensor:
    if isinstance(replacement, torch.Tensor):
        if replacement.shape != ids.shape:
            raise InputError(f"Replacements {list(replacement.shape)} were given for ids {list(ids.shape)}.")
        return replacement.to(ids)
    return torch.full_like(ids, replacement)
