"""What does BERT look at: single heads of an encoder find grammatical relations that no fixed offset finds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.evaluate.statistics import Interval, bootstrap_of

if TYPE_CHECKING:
    from polyhead.heads.relations import ParsedSentence, RelationTable
    from polyhead.model import HeadedModel

_NOUNS = ("king", "farmer", "teacher", "dog", "girl", "doctor", "sailor", "artist", "soldier", "neighbor")
_THINGS = ("letter", "house", "song", "bread", "picture", "garden", "boat", "book", "stone", "horse")
_ADJECTIVES = ("old", "young", "happy", "quiet", "tall", "famous", "small", "strange")
_VERBS = ("saw", "bought", "painted", "found", "wanted", "sold", "described", "remembered")
_ADVERBS = ("slowly", "often", "never", "suddenly")
_PREPOSITIONS = ("near", "behind", "with", "from")


def run(scale: Scale, seed: int) -> Evidence:
    """On sentences of a small grammar: the best head less the best fixed offset, for determiners and direct objects.

    Heads and offsets are chosen on one half of the sentences and compared on the other; the relation with the smaller
    lower bound decides.
    """
    from polyhead.data import load_texts
    from polyhead.heads.attention_probe import AttentionProbe
    from polyhead.heads.attention_profile import head_distance
    from polyhead.heads.relations import RelationAccuracy

    random = np.random.default_rng(seed)
    sentences = [_sentence(random) for _ in range(300 if scale == "smoke" else 2000)]
    half = len(sentences) // 2
    model = loaded("all-MiniLM-L6-v2")
    score = RelationAccuracy()
    first, second = score.measure(model, sentences[:half]), score.measure(model, sentences[half:])
    found = {name: _gain(first, second, name, seed) for name in sorted(first.hits)}
    blank = _random_weights(model)
    random_best = {row["relation"]: row["accuracy"] for row in score.measure(blank, sentences[:half]).best()}
    worse = min(("det", "obj"), key=lambda name: found[name][0].low)
    decides = found[worse][0]
    probe = AttentionProbe().fit(model, sentences[:half][:300])
    apart = head_distance(model, load_texts("ag-news", 20 if scale == "smoke" else 100), seed=seed)
    within, between = _by_layer(apart, model.layers)
    return Evidence(
        measured={
            f"gain {worse}": decides.value,
            **{f"accuracy {name}": value[1] for name, value in found.items()},
            "UAS of the probe": probe.score(model, sentences[half:][:300]),
            "distance of heads within a layer": within,
        },
        baseline={
            **{f"offset {name}": value[2] for name, value in found.items()},
            **{f"random weights {name}": value for name, value in sorted(random_best.items())},
            "distance between layers": between,
        },
        expected="on determiners and on direct objects a single head is right more often than the best fixed offset",
        interval=(decides.low, decides.high),
        verdict=verdict_of(decides.low, decides.high),
        decides=f"gain {worse}",
        data=f"{len(sentences)} sentences of a small grammar with gold relations, heads chosen on half of them",
        model=model.name,
        notes="A 6-layer sentence encoder and sentences of a toy grammar instead of BERT and the Penn Treebank.",
        details={name: {"head": list(value[3]), "low": value[0].low} for name, value in found.items()},
    )


def _sentence(random: np.random.Generator) -> ParsedSentence:
    """Subject, verb and object, each noun with a determiner and up to two adjectives, maybe a phrase between."""
    from polyhead.heads.relations import ParsedSentence

    words: list[str] = []
    heads: list[int] = []
    relations: list[str] = []

    def pick(words_of: tuple[str, ...]) -> str:
        return str(random.choice(words_of))

    def noun(kinds: tuple[str, ...], relation: str) -> int:
        before = ["the", *(pick(_ADJECTIVES) for _ in range(random.integers(3)))]
        at = len(words) + len(before)
        words.extend([*before, pick(kinds)])
        heads.extend([at] * len(before) + [-1])
        relations.extend(["det", *["amod"] * (len(before) - 1), relation])
        return at

    subject = noun(_NOUNS, "nsubj")
    if random.random() < 0.4:
        words.append(pick(_PREPOSITIONS))
        heads.append(-1)
        relations.append("case")
        case = len(words) - 1
        heads[case] = noun(_NOUNS, "nmod")
        heads[heads[case]] = subject
    if random.random() < 0.3:
        words.append(pick(_ADVERBS))
        heads.append(len(words))
        relations.append("advmod")
    verb = len(words)
    words.append(pick(_VERBS))
    heads.append(-1)
    relations.append("root")
    heads[subject] = verb
    heads[noun(_THINGS, "obj")] = verb
    words.append(".")
    heads.append(-1)
    relations.append("punct")
    return ParsedSentence(tuple(words), tuple(heads), tuple(relations))


def _gain(
    first: RelationTable, second: RelationTable, relation: str, seed: int
) -> tuple[Interval, float, float, tuple[int, int]]:
    """Best head less best offset, both chosen on ``first``, on ``second``; resampled by sentence."""
    (head,) = first.accuracy(relation).top(1)
    offset, _ = first.offset_baseline(relation)
    right = second.hits[relation][:, head[0], head[1]]
    fixed = second.offsets[relation] == offset
    of, sentence = np.unique(second.sentences[relation], return_inverse=True)
    sums = np.bincount(sentence, right - fixed, len(of))
    counts = np.bincount(sentence, minlength=len(of))
    interval = bootstrap_of(lambda rows: float(sums[rows].sum() / counts[rows].sum()), len(of), seed=seed)
    return interval, float(right.mean()), float(fixed.mean()), head


def _random_weights(model: HeadedModel) -> HeadedModel:
    import torch
    from transformers import AutoModel

    torch.manual_seed(0)
    return type(model)(AutoModel.from_config(model.config).eval(), name="random weights", files=model.files)


def _by_layer(apart: np.ndarray, layers: int) -> tuple[float, float]:
    layer = np.arange(len(apart)) // (len(apart) // layers)
    same = layer[:, None] == layer
    other = ~np.eye(len(apart), dtype=bool)
    return float(apart[same & other].mean()), float(apart[~same].mean())
