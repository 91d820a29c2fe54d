"""Head pooling on STS 2015: what chosen heads and layers of a frozen model are worth, with scored pairs and without.

Everything is chosen on pairs of 2012 to 2014 (2,000 of them, a like share of each set): penalties by holding sets
out, the variants below by hand on the same pairs. Each variant meets STS 2015 once. Intervals and the paired p-value
are from bootstrap samples of pairs within each set.

Run: ``python benchmarks/head_pooling.py [--only MODEL] [--cache FOLDER]``. Gemma takes about 20 minutes on one core;
pooled blocks are kept in the cache folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from polyhead.data import SentencePairs, load_sts, load_texts
from polyhead.embed import Encoder
from polyhead.evaluate.statistics import holm, shifted_bootstrap
from polyhead.pooling.heads import HeadPooler
from polyhead.pooling.heads_pooler import BlockPooler

HERE = Path(__file__).parent
RESAMPLES = 1000
# rarity, by_position and special are of the token weights; fit with pairs or without.
BLEND = {"kind": "blend", "rarity": 1e-2}
WIDE = {"rarity": 3e-3, "by_position": True, "dim": 768}
VARIANTS: dict[str, list[tuple[str, dict[str, Any], bool]]] = {
    "all-MiniLM-L6-v2": [("blend, no pairs", BLEND, False), ("blend, pairs", BLEND, True)],
    "gemma-3-270m": [
        ("layers, no pairs", {"kind": "layers", "power": 1.0, **WIDE}, False),
        ("heads and layers, pairs", {"kind": "both", "power": (0.5, 1.0), **WIDE}, True),
    ],
}


def training_pairs(count: int = 2000, seed: int = 0) -> SentencePairs:
    """``count`` pairs of STS 2012 to 2014, the same number of each set where it has so many."""
    sets = {}
    for year in (2012, 2013, 2014):
        sts = load_sts(year)
        for name in sorted(set(sts.group)):
            sets[f"{year}-{name}"] = [
                (pair, gold) for pair, gold, group in zip(sts.pairs, sts.gold, sts.group, strict=True) if group == name
            ]
    left, share = count, {}
    for done, name in enumerate(sorted(sets, key=lambda name: len(sets[name]))):
        share[name] = min(len(sets[name]), left // (len(sets) - done))
        left -= share[name]
    random = np.random.default_rng(seed)
    chosen = [
        (*members[i], name)
        for name, members in sets.items()
        for i in np.sort(random.choice(len(members), share[name], replace=False))
    ]
    return SentencePairs(
        "sts-2012-2014", [row[0] for row in chosen], np.array([row[1] for row in chosen]), [row[2] for row in chosen]
    )


def dense_vectors(model: str, texts: list[str], cache: Path) -> np.ndarray:
    """What the model's folder gives, or the mean of the last layer's states where it is a language model."""
    file = cache / f"{model}-dense-{len(texts)}.npy"
    if not file.is_file():
        encoder = Encoder(model, backend="torch", **({"pooling": "mean"} if model.startswith("gemma") else {}))
        np.save(file, encoder.encode(texts, normalize=False).dense)
    return np.load(file)


def pooled_blocks(model: str, reader: BlockPooler, name: str, texts: list[str], cache: Path) -> np.ndarray:
    """Blocks of texts as the reader pools them."""
    file = cache / f"{model}-{name}-{len(texts)}.npy"
    if not file.is_file():
        np.save(file, Encoder(model, pooling=reader, backend="torch").encode(texts, normalize=False).dense)
    return np.load(file, mmap_mode="r")


def similarities(vectors: np.ndarray, texts: list[str], pairs: SentencePairs) -> np.ndarray:
    """Cosine of each pair."""
    place = {text: row for row, text in enumerate(texts)}
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return np.array([unit[place[left]] @ unit[place[right]] for left, right in pairs.pairs])


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation, ties shared."""
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def resampled_means(found: dict[str, np.ndarray], pairs: SentencePairs, seed: int = 0) -> dict[str, np.ndarray]:
    """Mean Spearman over sets in ``RESAMPLES`` bootstrap samples of the pairs within each set, the same for all."""
    random, groups = np.random.default_rng(seed), np.array(pairs.group)
    members = [np.flatnonzero(groups == name) for name in sorted(set(pairs.group))]
    out = {name: np.zeros(RESAMPLES) for name in found}
    for draw in range(RESAMPLES):
        rows = [random.choice(each, len(each)) for each in members]
        for name, similarity in found.items():
            out[name][draw] = np.mean([spearman(similarity[r], pairs.gold[r]) for r in rows])
    return out


def measure(model: str, cache: Path, with_dense: bool = True) -> list[dict[str, Any]]:
    """One row a variant, the dense vector first unless it is left out."""
    train, test = training_pairs(), load_sts(2015)
    train_texts = sorted({text for pair in train.pairs for text in pair}, key=lambda text: (len(text), text))
    test_texts = list(dict.fromkeys(text for pair in test.pairs for text in pair))
    seen_texts = [*train_texts, *load_texts("ag-news", 3000)]
    found: dict[str, np.ndarray] = {}
    if with_dense:
        found["dense"] = similarities(dense_vectors(model, test_texts, cache), test_texts, test)
    facts: dict[str, dict[str, Any]] = {"dense": {}}
    readers: dict[str, tuple[BlockPooler, np.ndarray, np.ndarray]] = {}
    for name, knobs, labelled in VARIANTS[model]:
        pooler = HeadPooler(model, **knobs)
        widest = "blend" if knobs["kind"] == "blend" else "both"  # which holds the other kinds' blocks
        weighing = f"{widest}-{knobs.get('rarity')}-{knobs.get('by_position', False)}"
        if weighing not in readers:
            reader = HeadPooler(model, **{**knobs, "kind": widest}).reader(seen_texts)
            train_blocks = pooled_blocks(model, reader, f"{weighing}-train", train_texts, cache)
            readers[weighing] = (
                reader,
                train_blocks,
                pooled_blocks(model, reader, f"{weighing}-test", test_texts, cache),
            )
        reader, blocks, tested = readers[weighing]
        own = reader if knobs["kind"] == widest else pooler.reader(seen_texts)
        pooler.fit_blocks(own, train_texts, np.asarray(blocks[:, own.columns_in(reader)]), train if labelled else None)
        vectors = pooler.pooler_.combine(torch.from_numpy(np.asarray(tested[:, pooler.pooler_.columns_in(reader)])))
        found[name] = similarities(vectors.numpy(), test_texts, test)
        facts[name] = {
            "knobs": knobs,
            "pairs": len(train) if labelled else 0,
            "penalty": pooler.penalty_,
            "held_out": pooler.held_out_,
            "dim": vectors.shape[1],
            "heaviest": heaviest(pooler),
        }
        print(name, facts[name], flush=True)
    return rows_of(model, found, facts, test)


def heaviest(pooler: HeadPooler, count: int = 8) -> list[str]:
    """The heaviest blocks in words."""
    layers = [(share, f"states {layer}") for layer, share in enumerate(pooler.layers_)]
    values = pooler.heads_.values
    heads = [(share, f"L{layer}H{head}") for (layer, head), share in np.ndenumerate(values)]
    return [f"{name}: {share:.3f}" for share, name in sorted([*layers, *heads], reverse=True)[:count] if share > 0]


def rows_of(
    model: str, found: dict[str, np.ndarray], facts: dict[str, dict[str, Any]], test: SentencePairs
) -> list[dict[str, Any]]:
    """Values, intervals, and the paired test against the dense vector, corrected over the variants."""
    samples, groups = resampled_means(found, test), np.array(test.group)
    names = sorted(set(test.group))
    sets = {
        name: {group: spearman(similarity[groups == group], test.gold[groups == group]) for group in names}
        for name, similarity in found.items()
    }
    value = {name: float(np.mean(list(each.values()))) for name, each in sets.items()}
    variants = [name for name in found if name != "dense" and "dense" in found]
    p_values = [shifted_bootstrap(samples[name] - samples["dense"], value[name] - value["dense"]) for name in variants]
    corrected = dict(zip(variants, holm(p_values), strict=True))
    rows = []
    for name in found:
        row = {
            "model": model,
            "vector": name,
            "spearman": round(value[name], 4),
            "interval": np.quantile(samples[name], [0.025, 0.975]).round(4).tolist(),
            "sets": {group: round(each, 4) for group, each in sets[name].items()},
            **facts[name],
        }
        if name in corrected:
            difference = samples[name] - samples["dense"]
            row |= {
                "difference": round(value[name] - value["dense"], 4),
                "p": corrected[name],
                "difference_interval": np.quantile(difference, [0.025, 0.975]).round(4).tolist(),
            }
        rows.append(row)
        print(name, row["spearman"], row["interval"], row.get("difference"), row.get("p"), flush=True)
    return rows


def main() -> None:
    """Measure and write ``results/head_pooling.json``; a model that was not asked for keeps its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(VARIANTS))
    parser.add_argument(
        "--no-dense", action="store_true", help="leave out the model's own vector and the test against it"
    )
    parser.add_argument("--cache", type=Path, default=HERE / "results" / ".head_pooling")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "head_pooling.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.cache.mkdir(parents=True, exist_ok=True)
    models = [asked.only] if asked.only else list(VARIANTS)
    before = json.loads(asked.out.read_text())["rows"] if asked.out.is_file() else []
    rows = [row for row in before if row["model"] not in models]
    for model in models:
        rows += measure(model, asked.cache, not asked.no_dense)
    asked.out.write_text(json.dumps({"resamples": RESAMPLES, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
