"""Classification: a simple classifier learnt from few labelled vectors, judged on others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from polyhead.errors import InputError, MissingExtraError
from polyhead.evaluate.measured import Measured
from polyhead.evaluate.task_data import LabelledTexts
from polyhead.evaluate.vectors import Encodes, Progress, vectors

__all__ = ["few_of_each", "macro_f1", "measure_classification"]

SEED = 42  # mteb's, of samples and classifiers


def few_of_each(labels: Sequence[Any], samples: int, experiments: int, seed: int = SEED) -> list[list[int]]:
    """For each experiment ``samples`` rows of each label (all of a label that has fewer), drawn as mteb draws them.

    mteb shuffles the rows with one seed, takes the first of each label, and shuffles what it shuffled before for the
    next experiment.
    """
    order = list(range(len(labels)))
    drawn = []
    for _ in range(experiments):
        np.random.RandomState(seed).shuffle(order)
        seen: dict[Any, int] = defaultdict(int)
        rows = []
        for row in order:
            if seen[labels[row]] < samples:
                seen[labels[row]] += 1
                rows.append(row)
        drawn.append(rows)
    return drawn


def macro_f1(gold: np.ndarray, guessed: np.ndarray, classes: int) -> float:
    """Mean F1 of the classes that are in ``gold`` or ``guessed``, integers below ``classes``."""
    right = np.bincount(gold[gold == guessed], minlength=classes)
    both = np.bincount(gold, minlength=classes) + np.bincount(guessed, minlength=classes)
    return float((2 * right[both > 0] / both[both > 0]).mean())


def _classifier(probe: str, neighbours: int) -> Any:
    try:
        from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
        from sklearn.neighbors import KNeighborsClassifier  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("Classification needs scikit-learn: pip install 'polyhead[evaluate]'") from error
    if probe == "linear":
        return LogisticRegression(max_iter=100, random_state=SEED)
    return KNeighborsClassifier(n_neighbors=neighbours, metric="cosine")


def measure_classification(
    data: LabelledTexts,
    encoder: Encodes,
    *,
    probe: Literal["linear", "knn"] = "linear",
    samples: int = 8,
    experiments: int = 10,
    neighbours: int = 5,
    progress: Progress | None = None,
) -> dict[str, Measured]:
    """Learn labels from few vectors, ``experiments`` times, and judge each time on all texts to be judged by.

    ``accuracy`` is the mean over experiments, one value a text: the share of the experiments that got it right. ``f1``
    is the mean over experiments of the macro F1. The values are mteb's ``accuracy`` and ``f1`` for the same vectors.
    Intervals are over the judged texts; the texts learnt from stay as drawn.

    Args:
        data: texts and labels.
        encoder: gives their vectors, taken as they come.
        probe: "linear", logistic regression of at most 100 steps, or "knn", the most frequent label of the nearest.
        samples: of each label to learn from; mteb's tasks take 8 to 16.
        experiments: draws of samples.
        neighbours: of knn, by cosine.
        progress: called with texts encoded and texts to encode.

    Raises:
        InputError: an unknown probe, counts below 1, or fewer than two labels to learn.
        MissingExtraError: scikit-learn is not installed.

    Example:
        >>> from polyhead import Encoder
        >>> from polyhead.evaluate.classification import measure_classification
        >>> from polyhead.evaluate.task_data import load_labelled
        >>> data = load_labelled("banking77").limited(500)  # doctest: +SKIP
        >>> measure_classification(data, Encoder())["accuracy"].interval()  # doctest: +SKIP
    """
    if probe not in ("linear", "knn"):
        raise InputError(f"probe = {probe!r}, expected 'linear' or 'knn'.")
    if min(samples, experiments, neighbours) < 1:
        raise InputError(
            f"samples = {samples}, experiments = {experiments}, neighbours = {neighbours}: at least 1 each."
        )
    names = sorted(set(data.train_labels) | set(data.test_labels))
    if len(set(data.train_labels)) < 2:
        raise InputError(f"'{data.name}' has {len(set(data.train_labels))} label to learn; expected at least 2.")
    code = {name: number for number, name in enumerate(names)}
    gold = np.array([code[label] for label in data.test_labels])
    draws = few_of_each(data.train_labels, samples, experiments)
    needed = sorted(set().union(*draws))
    found = vectors(encoder, [*(data.train[row] for row in needed), *data.test], progress=progress)
    place = {row: number for number, row in enumerate(needed)}
    judged = found[len(needed) :]
    guesses = []
    for rows in draws:
        classifier = _classifier(probe, min(neighbours, len(rows)))
        classifier.fit(found[[place[row] for row in rows]], np.array([code[data.train_labels[row]] for row in rows]))
        guesses.append(classifier.predict(judged))
    guessed = np.array(guesses)
    return {
        "accuracy": Measured.mean((guessed == gold).mean(0)),
        "f1": Measured(len(gold), _mean_f1(gold, guessed, len(names))),
    }


def _mean_f1(gold: np.ndarray, guessed: np.ndarray, classes: int) -> Callable[[np.ndarray], float]:
    return lambda rows: float(np.mean([macro_f1(gold[rows], one[rows], classes) for one in guessed]))
