"""AUGRC: confidences rank otherwise than by AURC."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import combinations

import numpy as np

from polyhead.claims.base import Evidence, Scale, verdict_of
from polyhead.evaluate.classification import few_of_each
from polyhead.evaluate.selective import augrc, aurc, confidences, failure_auroc
from polyhead.evaluate.statistics import bootstrap_of
from polyhead.evaluate.task_data import LabelledTexts, load_labelled


def run(scale: Scale, seed: int) -> Evidence:
    """Share of the pairs of confidences that AURC and AUGRC put in different order.

    Logistic regression on all-MiniLM-L6-v2's vectors of Banking77 and AG News, eight texts a label to learn from; six
    confidences of each answer. Decides: the larger share of the two sets, its interval by resampling judged texts, as
    the paper speaks of sets on which rankings change. Supported where even the low end leaves one pair out of order,
    refuted where the high end leaves none.
    """
    smoke = scale == "smoke"
    names = ("banking77", "ag-news")
    sets = {name: _judged(load_labelled(name).limited(250 if smoke else None, seed), seed) for name in names}
    shares, figures = {}, {}
    for name, (scores, wrong) in sets.items():
        shares[name] = bootstrap_of(_swapped(scores, wrong), len(wrong), seed=seed, resamples=300)
        figures[name] = {
            which: {"augrc": augrc(sure, wrong), "aurc": aurc(sure, wrong), "failure auroc": failure_auroc(sure, wrong)}
            for which, sure in scores.items()
        } | {"accuracy": {"accuracy": float(1 - wrong.mean())}}
    first = max(shares, key=lambda name: shares[name].low)
    return Evidence(
        measured={f"swapped pairs, {name}": share.value for name, share in shares.items()},
        baseline={"swapped pairs if both rank alike": 0.0},
        expected="AURC and AUGRC put some pairs of confidences in different order: the interval lies above 0",
        interval=(shares[first].low, shares[first].high),
        verdict="refuted" if shares[first].high == 0 else verdict_of(shares[first].low, shares[first].high),
        decides=f"swapped pairs, {first}",
        data=", ".join(f"{name} ({len(wrong)} judged)" for name, (_, wrong) in sets.items()) + ", cut after 64 tokens",
        model="all-MiniLM-L6-v2, logistic regression",
        notes="Two sets of text and six confidences; the paper has six sets of images and thirteen. A swap among "
        "confidences that are nearly equal counts as any other.",
        details={"figures": figures, "intervals": {name: [share.low, share.high] for name, share in shares.items()}},
    )


def _judged(data: LabelledTexts, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Confidences of the answers on the judged texts, and which answers are wrong."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    from polyhead.embed import Encoder

    (rows,) = few_of_each(data.train_labels, 8, 1, seed=seed)
    texts = [*(data.train[row] for row in rows), *data.test]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that long ones are cut is said with the data
        vectors = Encoder(max_tokens=64).encode(texts, on_long="truncate").dense
    known, judged = vectors[: len(rows)], vectors[len(rows) :]
    model = LogisticRegression(max_iter=200).fit(known, [data.train_labels[row] for row in rows])
    wrong = (model.predict(judged) != np.array(data.test_labels)).astype(float)
    return confidences(model.predict_proba(judged), vectors=judged, known=known), wrong


def _swapped(scores: dict[str, np.ndarray], wrong: np.ndarray) -> Callable[[np.ndarray], float]:
    def of(rows: np.ndarray) -> float:
        values = [(augrc(sure[rows], wrong[rows]), aurc(sure[rows], wrong[rows])) for sure in scores.values()]
        pairs = list(combinations(values, 2))
        return sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs) / len(pairs)

    return of
