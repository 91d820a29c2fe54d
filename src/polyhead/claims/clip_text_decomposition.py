"""Text-based decomposition: embeddings are the sum of their heads' parts, and texts name what a head adds."""

from __future__ import annotations

import csv
from collections.abc import Sequence

import numpy as np
import torch

from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.headmap import HeadMap
from polyhead.heads.text_decomposition import EmbeddingDecomposer, EmbeddingParts
from polyhead.heads.text_span import text_span
from polyhead.model import HeadedModel

_TOPICS = {
    "world": "president, war, government, minister, election",
    "sports": "football, game, championship, team, player",
    "business": "stock market, company, profit, price, bank",
    "science and technology": "software, computer, internet, scientist, space",
}
_LAYERS, _TEXTS, _NAMED = 2, 20, 6  # last layers looked at, texts a head, heads ablated for a topic


def run(scale: Scale, seed: int) -> Evidence:
    """TextSpan of all-MiniLM-L6-v2's heads on AG News, and topic accuracy with the heads it names mean-ablated.

    Candidates are noun phrases of WordNet (WN18RR's entities). Over the heads of the last two layers, the variance
    explained by 20 texts is compared with 20 random candidates and with principal components. A head is named for a
    topic by the cosines of its texts with the topic's words, weighted by the variance each explains, less the mean over
    topics; the direct parts of the 6 heads with the highest are put at their mean, and the loss of a linear
    classifier's accuracy on texts of that topic is compared with random heads of the same layers. Supported where parts
    sum to the embedding within 1e-4, TextSpan explains more than random candidates, and named heads cost more than
    random ones; refuted where one of these fails for sure. Smoke takes 240 texts and 300 candidates, full 2,000 and
    3,000.
    """
    from polyhead.evaluate.statistics import bootstrap_interval

    count, phrases, draws = (240, 300, 10) if scale == "smoke" else (2_000, 3_000, 50)
    model = loaded("all-MiniLM-L6-v2")
    decomposer = EmbeddingDecomposer(model, normalize=True)
    texts, labels = _news(count, seed)
    parts = decomposer.texts(texts, batch_size=32, max_tokens=40)
    error = float((parts.total() - parts.vector).abs().max())
    nouns = _phrases(phrases, seed)
    candidates, words = _vectors(decomposer, nouns), _vectors(decomposer, list(_TOPICS.values()))
    shares, naming, named = _spans(parts, candidates, words, seed)
    heads = [HeadMap(values).top(_NAMED) for values in naming - naming.mean(0)]
    loss = _losses(parts, labels, heads, (seed, draws), model)
    cost = bootstrap_interval(loss["named"] - loss["random"], seed=seed)
    beyond = bootstrap_interval(shares["text span"] - shares["random"], seed=seed)
    verdicts = {verdict_of(each.low, each.high) for each in (cost, beyond)}
    failed = error > 1e-4 or "refuted" in verdicts
    read = {topic: [nouns[row] for row in named[heads[place][0]]] for place, topic in enumerate(_TOPICS)}
    return Evidence(
        measured={
            "largest difference of sum and embedding": error,
            "variance explained by 20 texts": float(shares["text span"].mean()),
            "beyond random candidates": beyond.value,
            "accuracy lost on the topic, named heads": float(loss["named"].mean()),
            "difference": cost.value,
        },
        baseline={
            "variance explained by 20 random candidates": float(shares["random"].mean()),
            "by 20 principal components": float(shares["components"].mean()),
            "accuracy lost on the topic, random heads": float(loss["random"].mean()),
            "accuracy of the classifier": float(loss["plain"].mean()),
        },
        expected="parts sum to the embedding; TextSpan between random candidates and principal components; heads named "
        "for a topic cost that topic more accuracy than random heads do",
        interval=(cost.low, cost.high),
        verdict="refuted" if failed else "supported" if verdicts == {"supported"} else "inconclusive",
        decides="difference",
        data=f"ag-news, {count} texts, half to train the classifier; {phrases} noun phrases of wn18rr",
        model=model.name,
        notes="A text encoder in the place of CLIP: nothing is said of images. Ablation is of direct parts alone.",
        details={
            "interval beyond random candidates": [beyond.low, beyond.high],
            "texts of a topic's first head": read,
            "heads": {topic: [list(head) for head in heads[place]] for place, topic in enumerate(_TOPICS)},
        },
    )


def _news(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    from polyhead.data import data_folder, load_texts

    texts = load_texts("ag-news")
    with (data_folder("ag-news", {"test.csv": ""}) / "test.csv").open(encoding="utf-8", newline="") as stream:
        labels = np.array([int(row[0]) - 1 for row in csv.reader(stream)])
    rows = np.random.default_rng(seed).permutation(len(texts))[:count]
    return [texts[row] for row in rows], labels[rows]


def _phrases(count: int, seed: int) -> list[str]:
    """Names of WordNet's noun synsets, ``land_reform.n.01`` as "land reform"."""
    from polyhead.data import data_folder

    file = data_folder("wn18rr", {"train.txt": ""}) / "train.txt"
    firsts = {line.split("\t")[0] for line in file.read_text(encoding="utf-8").splitlines()}
    nouns = sorted({name.rsplit(".", 2)[0].replace("_", " ") for name in firsts if ".n." in name})
    return [nouns[row] for row in np.random.default_rng(seed).permutation(len(nouns))[:count]]


def _vectors(decomposer: EmbeddingDecomposer, texts: Sequence[str]) -> torch.Tensor:
    return torch.cat([decomposer.texts(texts[i : i + 64], batch_size=64).vector for i in range(0, len(texts), 64)])


def _spans(
    parts: EmbeddingParts, candidates: torch.Tensor, words: torch.Tensor, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[tuple[int, int], list[int]]]:
    """Variance explained a head, by how; how much each head is named for a topic ``[topics, layers, heads]``; texts."""
    layers, width = parts.heads.shape[1:3]
    generator = np.random.default_rng(seed)
    shares: dict[str, list[float]] = {"text span": [], "random": [], "components": []}
    naming, named = np.full((len(words), layers, width), np.nan), {}
    cosines = (candidates @ words.T).double()  # embeddings are of length 1
    for layer in range(layers - _LAYERS, layers):
        for head in range(width):
            outputs = parts.heads[:, layer, head]
            found = text_span(outputs, candidates, _TEXTS)
            some = candidates[generator.permutation(len(candidates))[:_TEXTS]]
            singular = torch.linalg.svdvals(outputs.double() - outputs.double().mean(0)).square()
            shares["text span"].append(float(found.explained[-1]))
            shares["random"].append(float(text_span(outputs, some, _TEXTS).explained[-1]))
            shares["components"].append(float(singular[:_TEXTS].sum() / singular.sum()))
            gains = found.explained.diff(prepend=torch.zeros(1, dtype=torch.float64))
            naming[:, layer, head] = (gains @ cosines[found.texts]).numpy()
            named[layer, head] = found.texts[:5].tolist()
    return {name: np.array(values) for name, values in shares.items()}, naming, named


def _losses(
    parts: EmbeddingParts,
    labels: np.ndarray,
    heads: list[list[tuple[int, int]]],
    random: tuple[int, int],
    model: HeadedModel,
) -> dict[str, np.ndarray]:
    """Whether each test text is classified, and what of that is lost with its topic's heads ablated, ``[tests]``."""
    from polyhead.heads.head_pursuit import heads_like

    seed, draws = random
    half = len(labels) // 2
    train, wanted = parts.vector[:half], torch.eye(len(heads))[torch.tensor(labels[:half])] - 1 / len(heads)
    mean = train.mean(0)
    gram = (train - mean).T @ (train - mean) + 0.1 * torch.eye(train.shape[1])
    weight = torch.linalg.solve(gram, (train - mean).T @ wanted)

    def right(vectors: torch.Tensor) -> np.ndarray:
        guessed = ((vectors[half:] - mean) @ weight).argmax(-1).numpy()
        return np.asarray(guessed == labels[half:], dtype=np.float64)

    plain = right(parts.vector)
    found = {"plain": plain, "named": np.zeros(len(plain)), "random": np.zeros(len(plain))}
    for topic, chosen in enumerate(heads):
        mine = labels[half:] == topic
        others = [heads_like(chosen, model, seed + draw) for draw in range(draws)]
        lost = np.mean([plain - right(parts.mean_ablated(each)) for each in others], axis=0)
        found["named"][mine] = (plain - right(parts.mean_ablated(chosen)))[mine]
        found["random"][mine] = lost[mine]
    return found
