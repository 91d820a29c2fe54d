"""Small data of every task, and an encoder without a model, shared by the tests of the tasks."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from polyhead.data import SentencePairs
from polyhead.evaluate.datasets import RetrievalData
from polyhead.evaluate.task_data import LabelledTexts, candidates_of

TOPICS = ("card lost stolen block", "rate exchange euro dollar", "refund shop return money", "pin code wrong change")


@lru_cache(maxsize=1000)
def _word(word: str, dim: int) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(word.encode())).normal(size=dim)


def letters(texts: Sequence[str], dim: int = 24) -> np.ndarray:
    """Sums of a fixed random vector a word, ``[n, dim]`` float32, not normalised."""
    return np.array([sum(_word(word, dim) for word in text.split()) for text in texts], dtype=np.float32)


def coarse(texts: Sequence[str]) -> np.ndarray:
    """The same with few dimensions: a worse encoder."""
    return letters(texts, 3)


def sentences(count: int, seed: int, noise: int = 3) -> tuple[list[str], list[int]]:
    generator = np.random.default_rng(seed)
    filler = [f"w{i}" for i in range(40)]
    texts, labels = [], []
    for _ in range(count):
        label = int(generator.integers(len(TOPICS)))
        words = [*generator.choice(TOPICS[label].split(), 2), *generator.choice(filler, noise)]
        texts.append(" ".join(str(word) for word in generator.permutation(words)))
        labels.append(label)
    return texts, labels


def labelled() -> LabelledTexts:
    train, train_labels = sentences(120, 1)
    test, test_labels = sentences(90, 2)
    return LabelledTexts("toy", train, train_labels, test, test_labels)


def pairs(count: int = 80, labels: bool = False) -> SentencePairs:
    generator = np.random.default_rng(3)
    first, topics = sentences(count, 4)
    second, others = [], []
    for text, topic in zip(first, topics, strict=True):
        words = text.split()
        words[: int(generator.integers(5))] = sentences(1, int(generator.integers(1000)), 1)[0]
        second.append(" ".join(words))
        others.append(topic)
    shared = np.array([len(set(a.split()) & set(b.split())) for a, b in zip(first, second, strict=True)])
    gold = np.clip(shared + generator.normal(0, 1.0, count), 0, 5).round(1)
    if labels:
        gold = (gold > np.median(gold)).astype(float)
    return SentencePairs("toy", list(zip(first, second, strict=True)), gold, ["a", "b"] * (count // 2))


def retrieval() -> RetrievalData:
    texts, labels = sentences(60, 5)
    asked, topics = sentences(12, 6, noise=1)
    corpus = {f"d{i}": text for i, text in enumerate(texts)}
    qrels = {
        f"q{i}": {f"d{j}": 1 for j, label in enumerate(labels) if label == topic and j % 3 == 0}
        for i, topic in enumerate(topics)
    }
    return RetrievalData("toy", corpus, {f"q{i}": text for i, text in enumerate(asked)}, qrels)


def reranking():
    return candidates_of(retrieval(), 20)
