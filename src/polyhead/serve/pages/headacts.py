"""One head masked or scaled, and what changes: the results of a question, a similarity, or the next token."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.errors import InputError
from polyhead.evaluate.vectors import unit
from polyhead.search.update import POSTED
from polyhead.serve.pages.bench import check_head, token_texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from polyhead.model import HeadedModel
    from polyhead.search.index import Index
    from polyhead.serve.pages.bench import Bench

__all__ = ["Change", "Row", "change", "gain_of"]

MOST_GAIN = 2.0
SHOWN = 10


@dataclass(frozen=True)
class Row:
    """One line of a list before or after: a document or a token.

    Attributes:
        value: cosine or probability.
        moved: ranks it rose by since before (below 0: fell); None where it was not in the list before.
    """

    name: str
    value: float
    moved: int | None = 0


@dataclass(frozen=True)
class Change:
    """What acting on a head did.

    Attributes:
        what: "results", "similarity" or "tokens".
        before, after: lists of documents or tokens; empty for a similarity.
        numbers: single figures in words: what -> (before, after).
        note: what was measured, and how.
    """

    what: str
    note: str
    before: list[Row] = field(default_factory=list)
    after: list[Row] = field(default_factory=list)
    numbers: dict[str, tuple[float, float]] = field(default_factory=dict)


def gain_of(text: str) -> float:
    """What a head's output is multiplied by.

    Raises:
        InputError: it is no number from 0 to 2.
    """
    try:
        gain = float(text)
    except ValueError:
        gain = np.nan
    if not 0 <= gain <= MOST_GAIN:
        raise InputError(f"The factor is {text!r}; give a number from 0 (masked) to {MOST_GAIN:g}.")
    return gain


def change(
    bench: Bench, index: Index | None, place: tuple[int, int], gain: float, text: str, other: str = ""
) -> Change:
    """Run the model as it is and with one head's output multiplied, and tell the difference.

    Args:
        bench: has the model.
        index: whose rows a question is asked of.
        place: layer and head.
        gain: 0 masks the head, 1 leaves it.
        text: a question, the first of two texts, or the beginning that a decoder goes on from.
        other: the second text; "" asks the index with the first one.

    Raises:
        InputError: no such head, no text, or a question without an index.
    """
    if not text:
        raise InputError("There is nothing to run the model on; type a text.")
    with bench.model() as model:
        check_head(model, *place)
        if getattr(model.module, "lm_head", None) is not None:
            return _tokens(model, place, gain, text)
        if other:
            return _similarity(model, place, gain, (text, other))
        if index is None or not index.exists():
            raise InputError("There is no index to ask; type a second text to see the similarity of the two change.")
        return _results(model, index, place, gain, text)


def _both(model: HeadedModel, place: tuple[int, int], gain: float, run: Any) -> tuple[np.ndarray, np.ndarray]:
    """What ``run()`` gives with the model as it is, and with the head's output multiplied."""
    import torch

    from polyhead.act.gate import Gate

    gates = torch.ones(model.layers, model.heads)
    gates[place] = gain
    with torch.inference_mode():
        before = run()
        with Gate(gates).on(model):
            after = run()
    return before.double().cpu().numpy(), after.double().cpu().numpy()


def _vectors(
    model: HeadedModel, place: tuple[int, int], gain: float, texts: Sequence[str], *, question: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of length 1 ``[texts, dim]`` before and after, pooled as the encoder pools."""
    from polyhead.embed.folder import read_recipe
    from polyhead.embed.graph import EncoderGraph

    assert model.files is not None
    recipe = read_recipe(Path(model.files.path))
    prompt = recipe.prompts.get("query", "") if question else ""
    given = [prompt + (text.lower() if recipe.lowercase else text) for text in texts]
    inputs = model.tokenize(given, truncation=True)
    graph = EncoderGraph(model, recipe.pooling or ("mean",), recipe, (0,)).eval()
    graph.with_heads = False
    before, after = _both(model, place, gain, lambda: graph(inputs["input_ids"], inputs["attention_mask"]))
    return unit(before), unit(after)


def _similarity(model: HeadedModel, place: tuple[int, int], gain: float, texts: tuple[str, str]) -> Change:
    before, after = _vectors(model, place, gain, texts, question=False)
    numbers = {"cosine of the two texts": (float(before[0] @ before[1]), float(after[0] @ after[1]))}
    return Change("similarity", "Both texts were encoded with the head changed.", numbers=numbers)


def _results(model: HeadedModel, index: Index, place: tuple[int, int], gain: float, question: str) -> Change:
    before, after = _vectors(model, place, gain, [question], question=True)
    if before.shape[1] != index.meta.dim:
        raise InputError(
            f"The model gives vectors of {before.shape[1]} numbers and the index holds {index.meta.dim}; type a second "
            "text to see the similarity of the two change instead."
        )
    view = index.view()
    if not view.n:
        raise InputError("The index is empty; type a second text to see the similarity of the two change.")
    vectors = np.concatenate([before, after]).astype(np.float32)
    rows, found = view.nearest(vectors, "dense", min(view.n, 4 * SHOWN))
    lists = [_documents(view, each, scores) for each, scores in zip(rows, found, strict=True)]
    ranks = {name: rank for rank, name in enumerate(lists[0])}
    first = [Row(title, value) for title, value in list(lists[0].values())[:SHOWN]]
    second = [
        Row(title, value, ranks[name] - rank if name in ranks else None)
        for rank, (name, (title, value)) in enumerate(list(lists[1].items())[:SHOWN])
    ]
    note = "The question was encoded with the head changed; the documents' vectors are those of the index."
    return Change("results", note, first, second, {"cosine of the question with itself": (1.0, _dot(before, after))})


def _dot(before: np.ndarray, after: np.ndarray) -> float:
    return float(before[0] @ after[0])


def _documents(view: Any, rows: np.ndarray, scores: np.ndarray) -> dict[str, tuple[str, float]]:
    """The documents of rows by their best row, best first: id -> title and score."""
    kept = rows >= 0
    found: dict[str, tuple[str, float]] = {}
    for record, score in zip(view.fetch(rows[kept]), scores[kept], strict=True):
        name = str(record["doc_id"])
        found.setdefault(name, (record["title"] or str(record["path"]).removeprefix(POSTED), float(score)))
    return found


def _tokens(model: HeadedModel, place: tuple[int, int], gain: float, text: str) -> Change:
    inputs = model.tokenize([text], truncation=True)
    before, after = _both(model, place, gain, lambda: model(**inputs).logits[0, -1].float().softmax(-1))
    order = [np.argsort(-each, kind="stable")[:SHOWN] for each in (before, after)]
    ranks = {int(token): rank for rank, token in enumerate(np.argsort(-before, kind="stable"))}
    names = [token_texts(model, each.tolist()) for each in order]
    first = [Row(name, float(before[one])) for name, one in zip(names[0], order[0], strict=True)]
    second = [
        Row(name, float(after[one]), ranks[int(one)] - rank)
        for rank, (name, one) in enumerate(zip(names[1], order[1], strict=True))
    ]
    likeliest = int(order[0][0])
    numbers = {f"probability of “{names[0][0]}”": (float(before[likeliest]), float(after[likeliest]))}
    return Change("tokens", "The next token after the text, by the model's own head.", first, second, numbers)
