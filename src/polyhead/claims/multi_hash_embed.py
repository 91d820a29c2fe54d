"""Multi hash embeddings: a table of a tenth of the words costs little, and spelling helps with new words."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from polyhead.claims.base import Evidence, Scale
from polyhead.compress import MultiHashEmbedding, collisions
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.evaluate.task_data import load_labelled

DIM, WORDS, LITTLE = 32, 40, 0.02
SPELLING = {"prefix": 200, "suffix": 1000, "shape": 400}


class _Exact(nn.Module):
    """A row for every word seen in training, and one for all others."""

    def __init__(self, keys: torch.Tensor) -> None:
        super().__init__()
        self.known: torch.Tensor
        self.register_buffer("known", keys.unique())
        self.table = nn.Embedding(len(self.known) + 1, DIM)
        nn.init.uniform_(self.table.weight, -0.1, 0.1)

    def forward(self, keys: torch.Tensor) -> torch.Tensor:
        at = torch.searchsorted(self.known, keys).clamp_max(len(self.known) - 1)
        found: torch.Tensor = self.table(torch.where(self.known[at] == keys, at, len(self.known)))
        return found


class _Topics(nn.Module):
    """Mean of a text's word vectors, and a linear layer."""

    def __init__(self, words: MultiHashEmbedding) -> None:
        super().__init__()
        self.words, self.leave = words, nn.Linear(DIM, 4)

    def forward(self, keys: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        vectors = self.words(keys)[0] * real[..., None]
        logits: torch.Tensor = self.leave(vectors.sum(1) / real.sum(1, keepdim=True).clamp_min(1))
        return logits


def run(scale: Scale, seed: int) -> Evidence:
    """Topics of news from the mean of their words' vectors: a row for every word, or hashed tables of a tenth and less.

    Decides: accuracy with a row a word less that with a tenth of the rows and 4 hashes, lower case only; 2 points are
    "little". Beside it 1 and 2 hashes, a twentieth and a quarter, and all four attributes on texts of many new words.
    """
    full = scale == "full"
    data = load_labelled("ag-news")
    train = [_cut(text) for text in data.train[: 5600 if full else 4000]]
    test = [_cut(text) for text in data.test[: 2000 if full else 1000]]
    names = sorted(set(data.train_labels))
    labels = [
        torch.tensor([names.index(each) for each in kept])
        for kept in (data.train_labels[: len(train)], data.test_labels[: len(test)])
    ]
    known = {word.lower() for text in train for word in text}
    new = np.array([np.mean([word.lower() not in known for word in text]) for text in test])
    right: dict[str, np.ndarray] = {}
    sizes: dict[str, int] = {}
    for name, (share, hashes, attributes) in _variants(full).items():
        torch.manual_seed(seed)
        words = MultiHashEmbedding(DIM, {"norm": max(1, round(share * len(known))), **attributes}, hashes=hashes)
        inputs = [words.keys(part) for part in (train, test)]
        if name == "a row a word":
            words.tables["norm"] = _Exact(inputs[0][0][..., 0][inputs[0][1]])
        sizes[name] = sum(parameter.numel() for parameter in words.tables.parameters())
        right[name] = _trained(_Topics(words), inputs, labels, 6, seed)
    lost = bootstrap_interval(right["a row a word"] - right["10%, 4 hashes"], seed=seed)
    many = new >= np.quantile(new, 2 / 3)
    spelling = bootstrap_interval((right["10%, all attributes"] - right["10%, 4 hashes"])[many], seed=seed)
    keys = torch.tensor([int(key) for key in MultiHashEmbedding(4, {"norm": 1}).keys([sorted(known)])[0].flatten()])
    table = MultiHashEmbedding(4, {"norm": round(0.1 * len(known))}).tables["norm"]
    return Evidence(
        measured={"accuracy lost": lost.value, **{name: float(each.mean()) for name, each in right.items()}},
        baseline={"spelling, gained on new words": spelling.value, "words": float(len(known))},
        expected="at most 2 points lost with a tenth of the rows and 4 hashes",
        interval=(lost.low, lost.high),
        verdict="supported" if lost.high < LITTLE else "refuted" if lost.low > LITTLE else "inconclusive",
        decides="accuracy lost",
        data=f"AG News: {len(train)} texts to learn from, {len(test)} to judge by",
        model=f"mean of word vectors of {DIM} features",
        notes="Topics, not entities: no corpus of named entities is at hand. New words: the third of texts with most. "
        "Six passes, chosen on a part of the texts to learn from after three had left all tables unlearnt.",
        details={
            "interval of what spelling gains on texts of new words": [spelling.low, spelling.high],
            "numbers in tables": sizes,
            "collisions with a tenth of the rows": collisions(keys, table),  # type: ignore[arg-type]
        },
    )


def _variants(full: bool) -> dict[str, tuple[float, int, dict[str, int]]]:
    """Rows as a share of the words, hashes, and tables of further attributes."""
    found: dict[str, tuple[float, int, dict[str, int]]] = {
        "a row a word": (0.0, 1, {}),
        "10%, 4 hashes": (0.1, 4, {}),
        "10%, 1 hash": (0.1, 1, {}),
        "10%, all attributes": (0.1, 4, SPELLING),
        "25%, 4 hashes": (0.25, 4, {}),
    }
    if full:
        found |= {
            f"{share:.0%}, {k} hashes": (share, k, {})
            for share in (0.05, 0.25)
            for k in (1, 2, 4)
            if (share, k) != (0.25, 4)
        }
    return found


def _cut(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)[:WORDS]


def _trained(
    model: _Topics,
    inputs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    labels: Sequence[torch.Tensor],
    epochs: int,
    seed: int,
) -> np.ndarray:
    """Whether each test text got its topic, 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    (keys, real), (test_keys, test_real) = inputs
    for _ in range(epochs):
        for rows in torch.randperm(len(keys), generator=generator).split(64):
            loss = F.cross_entropy(model(keys[rows], real[rows]), labels[0][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        found: np.ndarray = (model(test_keys, test_real).argmax(1) == labels[1]).double().numpy()
    return found
