"""What the claims about objectives share: handwritten characters, texts, small networks, and the measure of a space."""

from __future__ import annotations

import csv
import io
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from polyhead.claims.base import Scale
from polyhead.evaluate.statistics import Interval, bootstrap_interval

__all__ = [
    "Compared",
    "Texts",
    "banking",
    "by_class",
    "character_network",
    "characters",
    "compare",
    "cranfield",
    "ndcg_at_10",
    "recall_at_1",
    "train",
]

_OMNIGLOT = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
_ZIPS = {f"images_background_small{i}.zip": f"{_OMNIGLOT}images_background_small{i}.zip" for i in (1, 2)}
_BANKING = "https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/master/banking_data/"
_TABLES = {"train.csv": _BANKING + "train.csv"}


@lru_cache(maxsize=4)
def characters(part: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """Omniglot drawings, 21 x 21 grey, and the character of each.

    Args:
        part: "train": five alphabets of the first archive; "test": the three alphabets of the second that are not in
            the first, so that no character is seen in training.
        limit: at most so many characters, evenly taken.

    Returns:
        ``[n, 441]`` in 0..1, ink 1, and ``[n]`` integers.
    """
    from PIL import Image

    from polyhead.data import data_folder

    folder = data_folder("omniglot", _ZIPS)
    name = list(_ZIPS)[0 if part == "train" else 1]
    images, labels = [], []
    with zipfile.ZipFile(folder / name) as archive:
        files = sorted(file for file in archive.namelist() if file.endswith(".png"))
        if part == "test":
            files = [file for file in files if file.split("/")[1] not in ("Greek", "Latin")]
        groups = sorted({file.rsplit("/", 1)[0] for file in files})
        step = 1 if limit is None else max(1, len(groups) // limit)
        kept = {group: number for number, group in enumerate(groups[::step][:limit])}
        for file in files:
            group = file.rsplit("/", 1)[0]
            if group in kept:
                pixels = 1 - np.asarray(Image.open(io.BytesIO(archive.read(file))), dtype=np.float32)
                images.append(pixels.reshape(21, 5, 21, 5).mean((1, 3)).ravel())
                labels.append(kept[group])
    return torch.tensor(np.stack(images)), torch.tensor(labels)


@lru_cache(maxsize=2)
def banking(intents: int, each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Vectors ``[n, 384]`` of Banking77 queries by all-MiniLM-L6-v2, frozen, and their intents ``[n]``.

    Args:
        intents: how many, drawn.
        each: at most so many queries of each, drawn.
        seed: of the draw.
    """
    from polyhead.data import data_folder
    from polyhead.embed import Encoder

    with (data_folder("banking77", _TABLES) / "train.csv").open(encoding="utf-8", newline="") as stream:
        rows = [(row["text"], row["category"]) for row in csv.DictReader(stream)]
    generator = np.random.default_rng(seed)
    names = sorted({name for _, name in rows})
    texts, labels = [], []
    for number, place in enumerate(generator.choice(len(names), intents, replace=False)):
        own = [text for text, name in rows if name == names[place]]
        for i in generator.permutation(len(own))[:each]:
            texts.append(own[i])
            labels.append(number)
    vectors = Encoder().encode(texts).dense
    return torch.tensor(np.asarray(vectors), dtype=torch.float32), torch.tensor(labels)


class _Picture(nn.Module):
    """Rows of 441 pixels as pictures; in training each batch is shifted by up to two pixels."""

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 1, 21, 21]`` of ``[n, 441]``."""
        x = x.view(-1, 1, 21, 21)
        shift = torch.randint(-2, 3, (2,)).tolist() if self.training else [0, 0]
        return torch.roll(x, shift, (2, 3))


@dataclass
class Texts:
    """Queries and documents as vectors.

    Attributes:
        queries, documents: ``[q, 384]`` and ``[d, 384]`` unit vectors by all-MiniLM-L6-v2, frozen.
        grades: ``[q, d]`` relevance, above 0 relevant.
        query_texts, document_texts: what they are of.
        data: in words.
    """

    queries: Tensor
    documents: Tensor
    grades: Tensor
    query_texts: list[str]
    document_texts: list[str]
    data: str


@lru_cache(maxsize=2)
def cranfield(queries: int | None, documents: int | None) -> Texts:
    """Cranfield, or a part of it: every so-manieth query, what they judge relevant, and further documents.

    Args:
        queries, documents: at most so many; None: all. Documents are cut after 96 tokens.
    """
    from polyhead.embed import Encoder
    from polyhead.evaluate.datasets import load_retrieval

    data = load_retrieval("cranfield")
    names = [query for query, grades in data.qrels.items() if any(grade > 0 for grade in grades.values())]
    names = names[:: 1 if queries is None else max(1, len(names) // queries)][:queries]
    wanted = {document for query in names for document, grade in data.qrels[query].items() if grade > 0}
    others = [document for document in data.corpus if document not in wanted]
    room = len(others) if documents is None else max(0, documents - len(wanted))
    kept = sorted(wanted) + others[:room]
    grades = torch.zeros(len(names), len(kept))
    place = {document: at for at, document in enumerate(kept)}
    for row, query in enumerate(names):
        for document, grade in data.qrels[query].items():
            if document in place:
                grades[row, place[document]] = grade
    encoder = Encoder(max_tokens=96)
    asked, told = [data.queries[name] for name in names], [data.corpus[name] for name in kept]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that long ones are cut is said above
        vectors = [torch.tensor(encoder.encode(part, on_long="truncate").dense) for part in (asked, told)]
    unit = [nn.functional.normalize(part.float(), dim=1) for part in vectors]
    words = f"cranfield, {len(names)} queries, {len(kept)} documents cut after 96 tokens"
    return Texts(unit[0], unit[1], grades, asked, told, words)


def ndcg_at_10(scores: Tensor, grades: Tensor) -> np.ndarray:
    """nDCG@10 of each query ``[q]`` with relevance 0 or 1; scores and grades ``[q, d]``."""
    gains = (grades > 0).double()
    discount = 1 / torch.log2(torch.arange(2, 12, dtype=torch.float64))
    top = gains.gather(1, scores.topk(min(10, scores.shape[1]), 1).indices)
    best = gains.sort(1, descending=True).values[:, :10]
    return ((top * discount).sum(1) / (best * discount).sum(1).clamp(min=1e-9)).numpy()


def character_network(seed: int, dim: int = 64) -> nn.Sequential:
    """A small convolutional network of characters, ``[n, 441] -> [n, dim]``, with its start given by the seed."""
    torch.manual_seed(seed)
    return nn.Sequential(
        _Picture(),
        nn.Conv2d(1, 16, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(288, dim),
    )


@dataclass
class Compared:
    """What objectives give on characters never seen in training.

    Attributes:
        hits: of each objective ``[runs, n]``, whether the nearest other drawing is of the same character.
        vectors: of each objective, ``[n, dim]`` a run.
        labels: ``[n]``.
        data: what was trained and judged on, in words.
    """

    hits: dict[str, np.ndarray]
    vectors: dict[str, list[Tensor]]
    labels: Tensor
    data: str

    def mean(self, name: str) -> float:
        """Recall@1."""
        return float(self.hits[name].mean())

    def difference(self, name: str, other: str, seed: int) -> Interval:
        """Recall@1 of ``name`` less that of ``other``."""
        return by_class(self.hits[name] - self.hits[other], self.labels, seed=seed)


def compare(
    objectives: dict[str, Callable[[int], Any]],
    scale: Scale,
    seed: int,
    *,
    similarity: dict[str, Callable[[Tensor, Tensor], Tensor]] | None = None,
    steps: int | None = None,
    noise: float = 0.0,
    dim: int = 64,
    head: dict[str, Callable[[int], nn.Module]] | None = None,
) -> Compared:
    """Train the same network with each objective and measure Recall@1 on unseen characters.

    Args:
        objectives: name -> ``objective(seed)`` to train with.
        scale: smoke: 100 characters to train on, 60 to judge, 120 steps, 2 runs; full: all, 600 steps, 5 runs.
        seed: of the first run; networks and batches of a run are the same for all objectives.
        similarity: name -> what nearest is measured with; cosine where not named.
        steps: another number of batches.
        noise: share of training labels drawn anew.
        dim: of the embeddings.
        head: name -> ``head(seed)`` put on the network.
    """
    torch.set_num_threads(1)  # the networks are tiny
    smoke = scale == "smoke"
    inputs, labels = characters("train", 100 if smoke else None)
    unseen, judged = characters("test", 60 if smoke else None)
    steps = (120 if smoke else 600) if steps is None else steps
    hits: dict[str, list[np.ndarray]] = {name: [] for name in objectives}
    vectors: dict[str, list[Tensor]] = {name: [] for name in objectives}
    for run in range(seed, seed + (2 if smoke else 5)):
        generator = torch.Generator().manual_seed(run)
        wrong = torch.rand(len(labels), generator=generator) < noise
        drawn = torch.randint(int(labels.max()) + 1, labels.shape, generator=generator)
        given = torch.where(wrong, drawn, labels)
        for name, objective in objectives.items():
            model = character_network(run, dim)
            if head is not None and name in head:
                model.append(head[name](run))
            torch.manual_seed(run)
            train(model, objective(run), (inputs, given), steps=steps, seed=run, lr=3e-3).eval()
            with torch.no_grad():
                found = torch.cat([model(part) for part in unseen.split(500)])
            vectors[name].append(found)
            hits[name].append(recall_at_1(found, judged, (similarity or {}).get(name)))
    data = f"omniglot, {int(labels.max()) + 1} characters trained on, {int(judged.max()) + 1} unseen ones judged"
    return Compared({name: np.stack(found) for name, found in hits.items()}, vectors, judged, data)


def train(
    model: nn.Module,
    objective: Callable[[Tensor, Tensor], Tensor],
    data: tuple[Tensor, Tensor],
    *,
    steps: int,
    seed: int,
    shape: tuple[int, int] = (24, 5),
    lr: float = 1e-3,
) -> nn.Module:
    """Train on balanced batches.

    Args:
        model: inputs to embeddings.
        objective: of embeddings and labels; parameters of its own are learned ten times as fast.
        data: inputs ``[n, ...]`` and labels ``[n]``.
        steps: batches.
        seed: of the batches, so that objectives compared see the same ones.
        shape: classes a batch, and how many of each.
        lr: learning rate of AdamW.
    """
    inputs, labels = data
    generator = np.random.default_rng(seed)
    groups = [np.flatnonzero(labels.numpy() == label) for label in labels.unique().numpy()]
    groups = [group for group in groups if len(group) >= shape[1]]
    own = list(objective.parameters()) if isinstance(objective, nn.Module) else []
    groups_of: list[dict[str, Any]] = [{"params": list(model.parameters())}, {"params": own, "lr": lr * 10}]
    optimizer = torch.optim.AdamW(groups_of, lr=lr)
    for _ in range(steps):
        chosen = generator.choice(len(groups), min(shape[0], len(groups)), replace=False)
        rows = torch.tensor(np.concatenate([generator.choice(groups[i], shape[1], replace=False) for i in chosen]))
        loss = objective(model(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@torch.no_grad()
def recall_at_1(
    vectors: Tensor, labels: Tensor, similarity: Callable[[Tensor, Tensor], Tensor] | None = None
) -> np.ndarray:
    """Whether the nearest other vector has the same label, ``[n]`` of 0 and 1; cosine unless another is given."""
    if similarity is None:
        vectors = nn.functional.normalize(vectors, dim=1)
        scores = vectors @ vectors.T
    else:
        scores = similarity(vectors, vectors)
    scores = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool), -torch.inf)
    return (labels[scores.argmax(1)] == labels).double().numpy()


def by_class(differences: Sequence[np.ndarray] | np.ndarray, labels: Tensor, *, seed: int) -> Interval:
    """Mean over runs of a difference of each query, with an interval over classes: queries of a class go together.

    Args:
        differences: ``[runs, n]``.
        labels: ``[n]``.
        seed: of the resampling.
    """
    each = np.mean(np.asarray(differences), axis=0)
    classes = labels.numpy()
    return bootstrap_interval([each[classes == label].mean() for label in np.unique(classes)], seed=seed)
