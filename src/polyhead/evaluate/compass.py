"""Choosing an encoder for a narrow domain: accuracy with intervals, a threshold, and what might explain them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.errors import InputError
from polyhead.evaluate.datasets import RetrievalData
from polyhead.evaluate.geometry import isotropy
from polyhead.evaluate.measured import Measured, compare
from polyhead.evaluate.report import Report
from polyhead.evaluate.statistics import Interval, bootstrap_of
from polyhead.evaluate.sts import spearman
from polyhead.evaluate.vectors import Encodes, unit, vectors
from polyhead.papers import paper

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CompassReport", "SimilarityThreshold", "compare_embedders", "domain_shift", "overlap"]


@paper("telecom-compass")
class SimilarityThreshold:
    """The similarity from which a passage counts as an answer, learnt from right and random pairs of one encoder.

    Args:
        recall: the share of right pairs that must pass; None takes the threshold that best parts the two (the highest
            share of right pairs passed plus share of random pairs stopped).

    Attributes:
        threshold_: pairs of at least this similarity pass.
        passed_: share of the right pairs that pass.
        stopped_: share of the random pairs that do not.

    Example:
        >>> from polyhead.evaluate.compass import SimilarityThreshold
        >>> found = SimilarityThreshold().fit([0.6, 0.7, 0.9], [0.1, 0.2, 0.65])
        >>> found.threshold_, round(found.passed_, 3), round(found.stopped_, 3)
        (0.6, 1.0, 0.667)
    """

    def __init__(self, recall: float | None = None) -> None:
        self.recall = recall

    def fit(self, correct: Sequence[float] | np.ndarray, random: Sequence[float] | np.ndarray) -> SimilarityThreshold:
        """Learn the threshold.

        Args:
            correct: similarities of questions to a right passage.
            random: similarities of questions to passages at random.

        Raises:
            InputError: an empty side, or a recall outside 0 to 1.
        """
        right, other = _two(correct, random)
        if self.recall is None:
            places = np.unique(right)
            passed = len(right) - np.searchsorted(right, places, "left")
            stopped = np.searchsorted(other, places, "left")
            # Both shares over one denominator, in whole numbers: equal sums are equal, and the lowest is taken.
            self.threshold_ = float(places[int((passed * len(other) + stopped * len(right)).argmax())])
        elif 0 < self.recall <= 1:
            self.threshold_ = float(right[len(right) - int(np.ceil(self.recall * len(right)))])
        else:
            raise InputError(f"recall = {self.recall}, expected a share above 0 and at most 1, or None.")
        self.passed_ = float((right >= self.threshold_).mean())
        self.stopped_ = float((other < self.threshold_).mean())
        return self


def _two(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.sort(np.asarray(side, dtype=np.float64)) for side in (a, b))
    if not len(first) or not len(second) or not np.isfinite([*first, *second]).all():
        raise InputError(f"Two lists of numbers are compared, neither empty; got {len(first)} and {len(second)}.")
    return first, second


@paper("telecom-compass")
def overlap(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """How far two distributions of similarities lie over one another: 0 (apart) to 1 (the same).

    ``1 - max |F_a - F_b|`` over their distribution functions; it is the area under both densities where these cross
    once. Needs neither bins nor a bandwidth.
    """
    first, second = _two(a, b)
    places = np.concatenate([first, second])
    shares = [np.searchsorted(one, places, "right") / len(one) for one in (first, second)]
    return float(1 - np.abs(shares[0] - shares[1]).max())


@paper("telecom-compass")
def domain_shift(domain: np.ndarray, general: np.ndarray, *, seed: int = 0) -> Interval:
    """Distance between the mean directions of domain and general texts, with its interval over the texts.

    Vectors are taken to length 1; the distance is 0 where the two sets point the same way on average, at most 2.

    Args:
        domain, general: ``[n, dim]`` and ``[m, dim]``, vectors of one encoder.
        seed: of the bootstrap.
    """
    sides = [unit(np.asarray(x, dtype=np.float64)) for x in (domain, general)]
    n, m = len(sides[0]), len(sides[1])
    if n < 2 or m < 2 or sides[0].shape[1] != sides[1].shape[1]:
        raise InputError(f"Two sets of vectors of one size are compared, got {sides[0].shape} and {sides[1].shape}.")

    def distance(rows: np.ndarray) -> float:
        first, second = rows[rows < n], rows[rows >= n] - n
        if not len(first) or not len(second):
            return float("nan")
        return float(np.linalg.norm(sides[0][first].mean(0) - sides[1][second].mean(0)))

    return bootstrap_of(distance, n + m, seed=seed, resamples=300)


@dataclass
class CompassReport:
    """Encoders on the questions of one domain.

    Attributes:
        accuracy: their accuracies with intervals and Holm-corrected paired tests against the first.
        facts: encoder -> "threshold", "passed", "stopped" (:class:`SimilarityThreshold`), "overlap" of right and random
            pairs, "overlap of top k" (of the first k and right pairs), "isoscore", "partition".
    """

    accuracy: Report
    facts: dict[str, dict[str, float]]

    def explains(self, fact: str, metric: str = "accuracy@1") -> float:
        """Spearman's correlation of a fact with an accuracy over the encoders; NaN where one does not vary."""
        names = list(self.facts)
        return spearman(
            np.array([self.facts[name][fact] for name in names]),
            np.array([self.accuracy.results[name][metric].value for name in names]),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {**self.accuracy.to_json(), "facts": self.facts}

    def table(self) -> Table:
        """Accuracies as :meth:`polyhead.evaluate.report.Report.table` shows them, the facts below."""
        from rich.markup import escape

        table = self.accuracy.table()
        table.add_section()
        for fact in next(iter(self.facts.values())):
            table.add_row(escape(fact), "", *(f"{facts[fact]:.3g}" for facts in self.facts.values()))
        return table


@paper("telecom-compass")
def compare_embedders(
    data: RetrievalData, encoders: Mapping[str, Encodes], *, k: int = 5, seed: int = 0
) -> CompassReport:
    """Measure encoders as the paper does: accuracy of questions to passages, thresholds, overlaps and isotropy.

    ``accuracy@1`` and ``accuracy@k`` are the share of questions with a right passage among the first by cosine. Random
    pairs are a question with a passage that is not right, one a question for each right pair.

    Args:
        data: questions, passages and which are right.
        encoders: by name; the first is tested against the others.
        k: passages looked at.
        seed: of random pairs, bootstrap and permutations.

    Raises:
        InputError: no encoder, or ``k`` not between 1 and the number of passages.
    """
    if not 1 <= k <= len(data.corpus):
        raise InputError(f"k = {k}, expected 1 to {len(data.corpus)}, the passages there are.")
    generator = np.random.default_rng(seed)
    place = {name: number for number, name in enumerate(data.corpus)}
    right = [[place[d] for d, grade in data.qrels[q].items() if grade > 0 and d in place] for q in data.queries]
    pairs = [(row, column) for row, columns in enumerate(right) for column in columns]
    random = [(row, _other(generator, len(place), right[row])) for row, _ in pairs]
    measured: dict[str, dict[str, Measured]] = {}
    facts: dict[str, dict[str, float]] = {}
    for name, encoder in encoders.items():
        passages = vectors(encoder, list(data.corpus.values()), side="document")
        cosine = unit(vectors(encoder, list(data.queries.values()), side="query")) @ unit(passages).T
        best = np.argsort(-cosine, axis=1, kind="stable")[:, :k]
        hits = np.array([np.isin(best[row], columns) for row, columns in enumerate(right)])
        measured[name] = {f"accuracy@{cut}": Measured.mean(hits[:, :cut].any(1)) for cut in sorted({1, k})}
        correct, others = (np.array([cosine[pair] for pair in some]) for some in (pairs, random))
        chosen = SimilarityThreshold().fit(correct, others)
        facts[name] = {
            "threshold": chosen.threshold_,
            "passed": chosen.passed_,
            "stopped": chosen.stopped_,
            "overlap": overlap(correct, others),
            "overlap of top k": overlap(correct, np.take_along_axis(cosine, best, 1).ravel()),
            "isoscore": isotropy(passages),
            "partition": isotropy(passages, "partition"),
        }
    meta = {"task": "embedders", "data": data.name, "card": data.card, "k": k}
    return CompassReport(compare(measured, seed=seed, meta=meta), facts)


def _other(generator: np.random.Generator, count: int, taken: list[int]) -> int:
    while (drawn := int(generator.integers(count))) in taken and len(taken) < count:
        pass
    return drawn
