"""How good a model is on held-out rows of the same kind as the training data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.training.data import Examples

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["Evaluation", "evaluator", "held_out"]

Evaluation = Callable[["SentenceTransformer"], dict[str, float]]


def held_out(examples: Examples) -> Evaluation:
    """The measure that fits the rows: a function of a model that gives metrics by name.

    "scored" rows give Spearman's correlation of cosine and score ("spearman"); "pairs" and "triplets" the share of
    anchors whose positive is the closest of all positives and negatives ("accuracy@1") and the mean reciprocal rank
    ("mrr"), positives with the same text counting as one; "labelled" rows the share whose nearest other row has the
    same label ("1nn accuracy"). "texts" alone have no measure and give none.
    """
    measures: dict[str, Callable[[Examples, SentenceTransformer], dict[str, float]]] = {
        "scored": _spearman,
        "pairs": _ranked,
        "triplets": _ranked,
        "labelled": _nearest,
        "texts": lambda examples, model: {},
    }
    return lambda model: measures[examples.kind](examples, model)


def _vectors(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    found = model.encode(texts, normalize_embeddings=True, show_progress_bar=False, convert_to_numpy=True)
    return np.asarray(found, dtype=np.float32)


def _spearman(examples: Examples, model: SentenceTransformer) -> dict[str, float]:
    from scipy.stats import spearmanr

    first, second = (_vectors(model, examples.columns[name]) for name in ("anchor", "positive"))
    return {"spearman": float(spearmanr((first * second).sum(1), examples.columns["score"]).statistic)}


def _ranked(examples: Examples, model: SentenceTransformer) -> dict[str, float]:
    texts = list(dict.fromkeys(text for name in examples.texts[1:] for text in examples.columns[name]))
    place = {text: i for i, text in enumerate(texts)}
    vectors = _vectors(model, texts)
    anchors = _vectors(model, examples.columns["anchor"])
    ranks = []
    for anchor, positive in zip(anchors, examples.columns["positive"], strict=True):
        similarity = vectors @ anchor
        own = similarity[place[positive]]
        ranks.append(1 + int((similarity > own).sum()) + (int((similarity == own).sum()) - 1) / 2)
    rank = np.asarray(ranks)
    return {"accuracy@1": float((rank == 1).mean()), "mrr": float((1 / rank).mean())}


def _nearest(examples: Examples, model: SentenceTransformer) -> dict[str, float]:
    vectors, labels = _vectors(model, examples.columns["text"]), np.asarray(examples.columns["label"])
    hits = 0
    for number, vector in enumerate(vectors):
        similarity = vectors @ vector
        similarity[number] = -np.inf
        hits += int(labels[similarity.argmax()] == labels[number])
    return {"1nn accuracy": hits / len(labels)}


def evaluator(measure: Evaluation) -> Any:
    """A measure as an evaluator of sentence-transformers' trainer."""
    from sentence_transformers.base.evaluation import BaseEvaluator

    class _Evaluator(BaseEvaluator):
        def __call__(
            self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
        ) -> dict[str, float]:
            return measure(model)

    return _Evaluator()
