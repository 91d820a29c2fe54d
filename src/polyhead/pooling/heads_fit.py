"""How alike pairs of texts are, block by block, and the weights of the blocks that follow what people said of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

__all__ = ["PairForms", "Whitening", "fit_weights", "folds_of", "mean_spearman", "weights_by_folds", "whitening"]


@dataclass(frozen=True)
class Whitening:
    """``z = (x - mean) matrix``: a block centred, its directions scaled by their spread to the power ``-power``."""

    mean: np.ndarray
    matrix: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """``[n, dim]`` to ``[n, dim]``."""
        return (x - self.mean) @ self.matrix


def whitening(x: np.ndarray, power: float | None, least: float = 1e-6) -> Whitening:
    """Whitening fitted on ``x [n, dim]``, scaled so that its rows have mean squared length 1.

    Args:
        x: pooled blocks of unlabelled texts.
        power: 1 makes all directions alike, 0 only centres, None leaves ``x`` as it is but for its scale.
        least: variances are at least this share of the largest.
    """
    mean = x.mean(0) if power is not None else np.zeros(x.shape[1], dtype=x.dtype)
    centred = (x - mean).astype(np.float64)
    if not power:
        matrix = np.eye(x.shape[1])
    else:
        variances, directions = np.linalg.eigh(centred.T @ centred / len(x))
        variances = np.maximum(variances, least * max(float(variances[-1]), 1e-30))
        matrix = directions * variances ** (-power / 2)
    size = np.sqrt(((centred @ matrix) ** 2).sum(1).mean())
    return Whitening(mean, (matrix / max(float(size), 1e-30)).astype(np.float32))


@dataclass(frozen=True)
class PairForms:
    """What cosines of weighted blocks are made of.

    Attributes:
        forms: ``[pairs, 3, blocks]``: products of the pair's two vectors, and of each with itself; ``[pairs, 3, blocks,
            blocks]`` for blocks that are added up instead of laid side by side.
        gold: ``[pairs]``.
        group: ``[pairs]`` the set of each pair; only orders within a set are compared.
    """

    forms: Tensor
    gold: np.ndarray
    group: np.ndarray

    def similarity(self, weights: Tensor, rows: Tensor | None = None) -> Tensor:
        """Cosines ``[pairs]`` under ``weights [blocks]``."""
        forms = self.forms if rows is None else self.forms[rows]
        added = forms.dim() == 4
        found = torch.einsum("nkab,a,b->nk", forms, weights, weights) if added else forms @ weights
        return found[:, 0] / (found[:, 1] * found[:, 2]).clamp(min=1e-18).sqrt()


def mean_spearman(similarity: np.ndarray, gold: np.ndarray, group: np.ndarray) -> float:
    """Mean over sets of Spearman's correlation within the set."""
    found = [spearmanr(similarity[group == name], gold[group == name]).statistic for name in np.unique(group)]
    return float(np.mean(found))


def folds_of(group: Sequence[str] | np.ndarray, count: int = 4) -> np.ndarray:
    """A fold for each pair, whole sets to a fold, folds of like sizes: what is held out comes from other sets."""
    names, sizes = np.unique(np.asarray(group), return_counts=True)
    count = min(count, len(names))
    filled = np.zeros(count, dtype=np.int64)
    fold = {}
    for place in np.argsort(-sizes, kind="stable"):
        fold[names[place]] = int(filled.argmin())
        filled[fold[names[place]]] += sizes[place]
    return np.array([fold[name] for name in group])


def fit_weights(
    pairs: PairForms, prior: np.ndarray, penalty: float, rows: np.ndarray | None = None, steps: int = 120
) -> np.ndarray:
    """Weights ``[blocks]``, not negative, for which cosines correlate best with ``gold`` within each set.

    Maximises the mean over sets of Pearson's correlation minus ``penalty`` times the mean squared logarithm of
    ``weights / prior``, by Adam on the logarithms.

    Args:
        pairs: with their gold scores.
        prior: ``[blocks]`` the weights to stay near; 0 leaves a block out.
        penalty: how strongly.
        rows: ``[pairs]`` bool, the pairs to use; None: all.
        steps: of Adam.
    """
    used = np.ones(len(pairs.gold), dtype=bool) if rows is None else rows
    sets = [np.flatnonzero(used & (pairs.group == name)) for name in np.unique(pairs.group[used])]
    sets = [each for each in sets if len(each) > 2 and np.ptp(pairs.gold[each]) > 0]
    order, sizes = torch.from_numpy(np.concatenate(sets)), [len(each) for each in sets]
    gold = torch.from_numpy(pairs.gold).to(pairs.forms.dtype)[order].split(sizes)
    chosen = PairForms(pairs.forms[order], pairs.gold, pairs.group)
    start = torch.from_numpy(prior).to(pairs.forms.dtype)
    change = torch.zeros_like(start, requires_grad=True)
    optimiser = torch.optim.Adam([change], lr=0.05)
    for _ in range(steps):
        found = chosen.similarity(start * change.exp()).split(sizes)
        fits = [torch.corrcoef(torch.stack(both))[0, 1] for both in zip(found, gold, strict=True)]
        loss = -torch.stack(fits).mean() + penalty * (change**2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return (start * change.detach().exp()).numpy()


def weights_by_folds(pairs: PairForms, prior: np.ndarray, penalty: float, fold: np.ndarray) -> np.ndarray:
    """Cosines ``[pairs]`` of each pair under weights that were fitted without its fold."""
    found = np.zeros(len(pairs.gold))
    for number in np.unique(fold):
        held = fold == number
        weights = torch.from_numpy(fit_weights(pairs, prior, penalty, ~held))
        rows = torch.from_numpy(np.flatnonzero(held))
        found[held] = pairs.similarity(weights.to(pairs.forms.dtype), rows).numpy()
    return found
