"""Landmark pooling: as good as the mean on short texts, better than it and than [CLS] on long ones."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from polyhead.claims._metric_learning import ndcg_at_10
from polyhead.claims._pooling import MODEL
from polyhead.claims.base import Evidence, Scale, loaded, verdict_of
from polyhead.data import load_sts
from polyhead.evaluate.statistics import Interval, bootstrap_interval
from polyhead.objectives import InfoNCE, Objective
from polyhead.pooling import LandmarkPooler, Landmarks, Pooler, pooler_for

_SHORT = 2


@dataclass(frozen=True)
class _Texts:
    """Texts as ids and as the states that the trained layer is given; padding right."""

    ids: Tensor
    mask: Tensor
    states: Tensor


def run(scale: Scale, seed: int) -> Evidence:
    """nDCG@10 on long texts of landmark pooling less the mean, each with the last layer trained for it.

    A text is one sentence of an STS pair among other STS sentences; its query is the other sentence of the pair. Pairs
    of 2012-14 train, pairs of 2015 judge, with fillers of their own years; all scores are 4 and more. Short texts have
    2 fillers, long ones 8 (smoke) or 28. Decides: landmarks less mean on long texts, by queries.
    """
    torch.set_num_threads(1)
    smoke = scale == "smoke"
    fillers, runs, steps, batch = (8, 1, 16, 8) if smoke else (28, 3, 200, 16)
    sizes = (32, 40) if smoke else (600, 200)
    layouts: dict[str, Landmarks | None] = {"cls": None, "mean": None, "landmarks": _landmarks(16 if smoke else 32)}
    if not smoke:
        layouts["landmarks, drawn"] = _landmarks((8, 64))
    scores: dict[tuple[str, str], list[np.ndarray]] = {}
    for one in range(seed, seed + runs):
        texts = {
            (part, count): _documents(part, size, count, one)
            for part, size in zip(("train", "test"), sizes, strict=True)
            for count in (_SHORT, fillers)
        }
        plain = {key: _states(some, None) for key, some in texts.items()}
        for name, landmarks in layouts.items():
            given = {key: _states(some, landmarks) for key, some in texts.items()} if landmarks else plain
            pooler = LandmarkPooler(landmarks.id) if landmarks else pooler_for(name)
            tail = _train([given["train", count] for count in (_SHORT, fillers)], pooler, (steps, batch), one)
            for length, count in (("short", _SHORT), ("long", fillers)):
                queries, documents = given["test", count]
                similarity = _vectors(tail, pooler, queries) @ _vectors(tail, pooler, documents).T
                scores.setdefault((name, length), []).append(ndcg_at_10(similarity, torch.eye(len(similarity))))
    gain = {
        (other, length): _difference(scores["landmarks", length], scores[other, length], seed)
        for other in ("mean", "cls")
        for length in ("short", "long")
    }
    decides = gain["mean", "long"]
    return Evidence(
        measured={
            "ndcg@10 landmarks, long": float(np.mean(scores["landmarks", "long"])),
            "difference": decides.value,
            "difference on short texts": gain["mean", "short"].value,
        },
        baseline={f"ndcg@10 {name}, {length}": float(np.mean(each)) for (name, length), each in scores.items()},
        expected="landmarks above the mean and [CLS] on long texts, no worse than the mean on short ones",
        interval=(decides.low, decides.high),
        verdict=verdict_of(decides.low, decides.high),
        decides="difference",
        data=f"sts pairs with scores from 4, {sizes[0]} to train on, {sizes[1]} judged, {_SHORT} and {fillers} fillers",
        model=f"{MODEL}, last layer trained",
        notes=(
            "A model made for the mean, of which one layer learns the new layout; the paper trains whole models. Texts "
            "of at most 512 tokens, and fillers as short as the needle."
        ),
        details={
            f"landmarks less {other}, {length}": [found.value, found.low, found.high]
            for (other, length), found in gain.items()
        },
    )


def _landmarks(interval: int | tuple[int, int]) -> Landmarks:
    return Landmarks(loaded(MODEL).tokenizer, interval)


def _difference(found: list[np.ndarray], other: list[np.ndarray], seed: int) -> Interval:
    return bootstrap_interval(np.mean(found, 0) - np.mean(other, 0), seed=seed)


def _documents(part: str, size: int, fillers: int, seed: int) -> tuple[list[str], list[str]]:
    """Queries, and texts of which each answers the query of its number."""
    generator = np.random.default_rng([seed, fillers])
    years = (2012, 2013, 2014) if part == "train" else (2015,)
    like: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    for data in map(load_sts, years):
        for pair, gold in zip(data.pairs, data.gold, strict=True):
            (like if gold >= 4 and pair[0] != pair[1] else others).append(pair)
    drawn = [like[i] for i in generator.permutation(len(like))[:size]]
    texts = []
    for _, needle in drawn:
        around = [others[i][0] for i in generator.choice(len(others), fillers, replace=False)]
        around.insert(int(generator.integers(fillers + 1)), needle)
        texts.append(" ".join(around))
    return [query for query, _ in drawn], texts


@torch.inference_mode()
def _states(texts: tuple[list[str], list[str]], landmarks: Landmarks | None) -> tuple[_Texts, _Texts]:
    """Queries and texts before the last layer."""
    model = loaded(MODEL)
    made = []
    for side in texts:
        given = [landmarks.mark(text) for text in side] if landmarks else side
        found = model.tokenizer(given, padding=True, truncation=True, max_length=512, return_tensors="pt")
        ids, mask = found["input_ids"], found["attention_mask"]
        states = torch.zeros(*ids.shape, model.hidden_size)
        for rows in mask.sum(1).argsort().split(16):
            length = int(mask[rows].sum(1).max())
            part = model(input_ids=ids[rows, :length], attention_mask=mask[rows, :length], output_hidden_states=True)
            states[rows, :length] = part.hidden_states[-2]
        made.append(_Texts(ids, mask, states))
    queries, documents = made
    return queries, documents


def _pooled(tail: nn.Module, pooler: Pooler, texts: _Texts, rows: Tensor) -> Tensor:
    """Vectors of some of the texts."""
    mask = texts.mask[rows]
    length = int(mask.sum(1).max())
    mask = mask[:, :length]
    bias = torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo(torch.float32).min)[:, None, None]
    states = tail(texts.states[rows][:, :length].clone(), bias.expand(-1, -1, length, -1))
    return pooler(states, mask, ids=texts.ids[rows][:, :length])


def _train(data: list[tuple[_Texts, _Texts]], pooler: Pooler, work: tuple[int, int], seed: int) -> nn.Module:
    """The model's last layer, trained with InfoNCE on batches of short and of long texts in turn.

    Args:
        data: queries and texts, short ones and long ones.
        pooler: what their vectors are made with.
        work: batches, and pairs in each.
        seed: of the batches.
    """
    model: Any = loaded(MODEL).module
    tail: nn.Module = copy.deepcopy(model.encoder.layer[-1])
    optimizer = torch.optim.AdamW(tail.parameters(), lr=1e-4)
    objective = Objective(InfoNCE(temperature=0.05))
    generator = torch.Generator().manual_seed(seed)
    for step in range(work[0]):
        queries, documents = data[step % len(data)]
        rows = torch.randperm(len(queries.ids), generator=generator)[: work[1]]
        loss = objective(_pooled(tail, pooler, queries, rows), other=_pooled(tail, pooler, documents, rows))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tail.eval()


@torch.no_grad()
def _vectors(tail: nn.Module, pooler: Pooler, texts: _Texts) -> Tensor:
    rows = torch.arange(len(texts.ids)).split(32)
    return functional.normalize(torch.cat([_pooled(tail, pooler, texts, part) for part in rows]), dim=1)
