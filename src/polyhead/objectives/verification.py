"""Same or not, by one threshold on the similarity of two vectors (paper facenet, section 4)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from polyhead.errors import InputError
from polyhead.objectives.similarity import Similarity
from polyhead.objectives.triplet import SquaredUnitEuclidean
from polyhead.papers import paper

__all__ = ["EmbeddingVerifier"]


@paper("facenet")
class EmbeddingVerifier:
    """Finds the threshold above which two vectors are of the same thing.

    Args:
        similarity: None: minus the squared distance of unit vectors.
        folds: parts of the pairs; each is judged with the threshold of the others.
        seed: of the parts.

    Attributes:
        threshold_: best on all pairs.
        accuracy_: mean over folds of the accuracy on pairs the threshold was not chosen on.
        fold_accuracy_: ``[folds]``.

    Example:
        >>> import torch
        >>> from polyhead.objectives import EmbeddingVerifier
        >>> first = torch.eye(4).repeat(5, 1)
        >>> second = torch.cat((first[:10], first[10:].roll(1, 0)))
        >>> same = torch.arange(20) < 10
        >>> verifier = EmbeddingVerifier(folds=2).fit(first, second, same)
        >>> verifier.accuracy_, verifier.val_at_far(first, second, same, far=0.01)
        (1.0, 1.0)
    """

    def __init__(self, similarity: Similarity | None = None, *, folds: int = 10, seed: int = 0) -> None:
        self.similarity = similarity
        self.folds = folds
        self.seed = seed

    def fit(self, first: Tensor, second: Tensor, same: Tensor) -> EmbeddingVerifier:
        """Choose the threshold.

        Args:
            first, second: ``[n, d]`` the two vectors of each pair.
            same: ``[n]`` bool.
        """
        scores, truth = self._scores(first, second, same)
        if not 2 <= self.folds <= len(truth):
            raise InputError(f"folds is {self.folds}, expected 2 to the number of pairs, {len(truth)}.")
        parts = np.random.default_rng(self.seed).permutation(len(truth)) % self.folds
        found = []
        for fold in range(self.folds):
            own = parts == fold
            limit = _best(scores[~own], truth[~own])
            found.append(float(((scores[own] > limit) == truth[own]).mean()))
        self.fold_accuracy_ = np.array(found)
        self.accuracy_ = float(self.fold_accuracy_.mean())
        self.threshold_ = _best(scores, truth)
        return self

    def predict(self, first: Tensor, second: Tensor) -> np.ndarray:
        """Whether each pair is of the same thing, ``[n]`` bool."""
        decided: np.ndarray = self._compare(first, second) > self.threshold_
        return decided

    def val_at_far(self, first: Tensor, second: Tensor, same: Tensor, *, far: float = 1e-3) -> float:
        """Share of same pairs accepted at the lowest threshold that accepts at most ``far`` of the different ones."""
        scores, truth = self._scores(first, second, same)
        different = np.sort(scores[~truth])[::-1]
        limit = different[int(np.floor(far * len(different) + 1e-9))]
        return float((scores[truth] > limit).mean())

    def _compare(self, first: Tensor, second: Tensor) -> np.ndarray:
        similarity = SquaredUnitEuclidean() if self.similarity is None else self.similarity
        with torch.no_grad():
            scores: np.ndarray = similarity.paired(first, second).double().numpy()
        return scores

    def _scores(self, first: Tensor, second: Tensor, same: Tensor) -> tuple[np.ndarray, np.ndarray]:
        truth = same.bool().numpy()
        if len(truth) != len(first) or truth.all() or not truth.any():
            raise InputError(f"Expected one mark for each of {len(first)} pairs, some same and some not.")
        return self._compare(first, second), truth


def _best(scores: np.ndarray, truth: np.ndarray) -> float:
    """The threshold of highest accuracy, halfway between two scores; the lowest such where several are as good."""
    order = np.argsort(scores)
    ranked = scores[order]
    limits = np.concatenate(([ranked[0] - 1], (ranked[:-1] + ranked[1:]) / 2, [ranked[-1] + 1]))
    below = np.concatenate(([0], np.cumsum(~truth[order])))  # different pairs refused
    above = truth.sum() - np.concatenate(([0], np.cumsum(truth[order])))  # same pairs accepted
    right = below + above
    real = np.concatenate(([True], ranked[1:] > ranked[:-1], [True]))  # ties cannot be cut
    return float(limits[np.where(real, right, -1).argmax()])
