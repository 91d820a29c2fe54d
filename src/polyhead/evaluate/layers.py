"""Every layer of a model measured: as a space, without labels, and by the tasks its vectors are used for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.errors import InputError
from polyhead.evaluate.geometry import curvature, dime, effective_rank, infonce, lidar, matrix_entropy
from polyhead.evaluate.measured import Measured, compare
from polyhead.evaluate.report import Report
from polyhead.evaluate.statistics import bootstrap_interval
from polyhead.evaluate.sts import spearman
from polyhead.headmap import HeadMap
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["LayerCurve", "LayerSweep", "drop_words", "head_geometry", "layer_metrics", "layer_sweep", "layer_vectors"]

PROMPT_METRICS: dict[str, Callable[[np.ndarray], float]] = {
    "prompt entropy": matrix_entropy,
    "curvature": curvature,
    "prompt effective rank": effective_rank,
}
SET_METRICS: dict[str, Callable[[np.ndarray], float]] = {
    "data-set entropy": matrix_entropy,
    "effective rank": effective_rank,
}
VIEW_METRICS: dict[str, Callable[[np.ndarray], float]] = {
    "infonce": lambda views: infonce(views[:, 0], views[:, 1]),
    "dime": lambda views: dime(views[:, 0], views[:, 1]),
    "lidar": lidar,
}
METRICS = (*PROMPT_METRICS, *SET_METRICS, *VIEW_METRICS)

Tokens = list[np.ndarray]


@dataclass(frozen=True)
class LayerCurve:
    """One number for each place between layers: 0 is what enters the first, the last is what the model gives.

    Attributes:
        values: ``[layers + 1]``.
        name: of the measure.
        model, data: it was measured on.
        texts: ``[texts, layers + 1]``, where it is a mean over texts; else None.
    """

    values: np.ndarray
    name: str
    model: str = ""
    data: str = ""
    texts: np.ndarray | None = field(default=None, repr=False)

    def best(self, *, lowest: bool = False) -> int:
        """The place of the highest (or lowest) value; ties go to the earlier."""
        return int(np.argmin(self.values) if lowest else np.argmax(self.values))

    def rank_correlation(self, other: LayerCurve) -> float:
        """Spearman's correlation of two curves of one model over its layers.

        Raises:
            InputError: another number of places.
        """
        if len(self.values) != len(other.values):
            raise InputError(
                f"Curves of one model are compared, got {len(self.values)} and {len(other.values)} places."
            )
        return spearman(self.values, other.values)

    def to_json(self, *, seed: int = 0) -> dict[str, Any]:
        """Plain values; with 95% intervals over texts where the measure is a mean over them."""
        plain: dict[str, Any] = {"name": self.name, "model": self.model, "data": self.data}
        plain["values"] = self.values.tolist()
        if self.texts is not None:
            known = [one[np.isfinite(one)] for one in self.texts.T]
            plain["intervals"] = [asdict(bootstrap_interval(one, seed=seed)) for one in known]
        return plain


@paper("layer-by-layer")
def layer_vectors(
    model: HeadedModel, texts: Sequence[str], *, max_tokens: int = 128, batch: int = 16, tokens: bool = False
) -> tuple[np.ndarray, list[Tokens]]:
    """Mean-pooled vectors of texts at every place, ``[texts, layers + 1, hidden]``, and token states if asked for.

    Args:
        model: a text model; the last place is its ``last_hidden_state`` (after a final norm) where it gives one.
        texts: cut after ``max_tokens``.
        max_tokens, batch: of a forward pass.
        tokens: also give, for each text, ``[tokens, hidden]`` at each place.

    Raises:
        InputError: no texts.
    """
    import torch

    if not texts:
        raise InputError("There are no texts to encode.")
    pooled, states = [], []
    for start in range(0, len(texts), batch):
        inputs = model.tokenize(list(texts[start : start + batch]), truncation=True, max_length=max_tokens)
        with model.record("tokens") as recording, torch.no_grad():
            outputs = model(**inputs)
        found = recording.tokens.float()  # [batch, places, tokens, hidden]
        final = getattr(outputs, "last_hidden_state", None)
        if final is not None:
            found = torch.cat([found[:, :-1], final.float().unsqueeze(1)], dim=1)
        real = inputs["attention_mask"].to(found)[:, None, :, None]
        pooled.append(((found * real).sum(2) / real.sum(2)).cpu().numpy())
        if tokens:
            kept = inputs["attention_mask"].bool()
            states += [list(one[:, mask].double().cpu().numpy()) for one, mask in zip(found, kept, strict=True)]
    return np.concatenate(pooled), states


def _or_nan(measure: Callable[[np.ndarray], float], states: np.ndarray) -> float:
    try:
        return measure(states)
    except InputError:
        return float("nan")


def drop_words(texts: Sequence[str], *, share: float = 0.15, seed: int = 0) -> list[str]:
    """Views of texts: each word left out with chance ``share``, at least one kept."""
    generator = np.random.default_rng(seed)
    views = []
    for text in texts:
        words = text.split()
        kept = [word for word, chance in zip(words, generator.random(len(words)), strict=True) if chance >= share]
        views.append(" ".join(kept or words[:1]))
    return views


@paper("layer-by-layer")
def layer_metrics(
    model: HeadedModel,
    texts: Sequence[str],
    metrics: Sequence[str] = METRICS,
    *,
    views: int = 4,
    seed: int = 0,
    max_tokens: int = 128,
    data: str = "",
) -> dict[str, LayerCurve]:
    """Label-free measures of every layer.

    "prompt entropy", "curvature" and "prompt effective rank" are of the token states of each text, averaged over texts;
    "data-set entropy" and "effective rank" of the mean-pooled vectors; "infonce", "dime" and "lidar" of views of the
    texts (:func:`drop_words`), the first two of two views. See :mod:`polyhead.evaluate.geometry`. A text without the
    measure (fewer than 3 tokens, or the same token again and again, has no curvature) is NaN in the curve's ``texts``
    and left out of its mean.

    Args:
        model: a text model.
        texts: at least 3.
        metrics: names from those above.
        views: of each text, for lidar.
        seed: of the views.
        max_tokens: texts are cut after these.
        data: what the texts are, for the curves.

    Raises:
        InputError: an unknown name, or fewer than two views.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or views < 2:
        raise InputError(f"Metrics are {', '.join(METRICS)}, of at least 2 views; got {unknown}, {views} views.")
    by_prompt = [name for name in metrics if name in PROMPT_METRICS]
    pooled, states = layer_vectors(model, texts, max_tokens=max_tokens, tokens=bool(by_prompt))
    curves = {}
    for name in by_prompt:
        each = np.array([[_or_nan(PROMPT_METRICS[name], place) for place in places] for places in states])
        curves[name] = LayerCurve(np.nanmean(each, axis=0), name, model.name, data, each)
    places = range(pooled.shape[1])
    for name in (name for name in metrics if name in SET_METRICS):
        values = np.array([SET_METRICS[name](pooled[:, place]) for place in places])
        curves[name] = LayerCurve(values, name, model.name, data)
    by_view = [name for name in metrics if name in VIEW_METRICS]
    if by_view:
        changed = [drop_words(texts, seed=seed + number) for number in range(views if "lidar" in by_view else 2)]
        seen = np.stack([layer_vectors(model, view, max_tokens=max_tokens)[0] for view in changed], axis=1)
        for name in by_view:
            values = np.array([VIEW_METRICS[name](seen[:, :, place]) for place in places])
            curves[name] = LayerCurve(values, name, model.name, data)
    return {name: curves[name] for name in metrics}


@paper("layer-by-layer")
def head_geometry(
    model: HeadedModel,
    texts: Sequence[str],
    measure: Callable[[np.ndarray], float] = matrix_entropy,
    *,
    name: str = "",
    max_tokens: int = 128,
    batch: int = 16,
) -> HeadMap:
    """A measure of a cloud of vectors for each head: of its mean-pooled outputs, one a text.

    Args:
        model: a text model.
        texts: cut after ``max_tokens``.
        measure: of ``[texts, head_dim]``, such as those of :mod:`polyhead.evaluate.geometry`.
        name: of the map; by default the measure's.
        max_tokens, batch: of a forward pass.
    """
    import torch

    pooled = []
    for start in range(0, len(texts), batch):
        inputs = model.tokenize(list(texts[start : start + batch]), truncation=True, max_length=max_tokens)
        with model.record("heads") as recording, torch.no_grad():
            model(**inputs)
        real = inputs["attention_mask"].to(recording.heads)[:, None, None, :, None]
        pooled.append(((recording.heads * real).sum(3) / real.sum(3)).double().cpu().numpy())
    found = np.concatenate(pooled)
    values = np.array(
        [[measure(found[:, layer, head]) for head in range(found.shape[2])] for layer in range(found.shape[1])]
    )
    return HeadMap(values, name=name or measure.__name__, model=model.name, data=f"{len(texts)} texts")


@dataclass(frozen=True)
class LayerSweep:
    """A task measured at every place of a model.

    Attributes:
        curve: the metric at each place.
        report: places named "last", "0", "1", … with intervals, each tested against the last, Holm-corrected.
    """

    curve: LayerCurve
    report: Report


@paper("layer-by-layer")
def layer_sweep(
    model: HeadedModel,
    tasks: Mapping[str, Callable[[Callable[[Sequence[str]], np.ndarray]], Measured]],
    texts: Sequence[str],
    *,
    max_tokens: int = 128,
    seed: int = 0,
) -> dict[str, LayerSweep]:
    """Tasks with the mean-pooled vectors of every layer.

    Args:
        model: a text model.
        tasks: name -> a function that measures an encoder, such as
            ``lambda encode: measure_sts(data, encode)["spearman"]``.
        texts: every text the tasks use; encoded once, whatever the number of tasks.
        max_tokens: texts are cut after these.
        seed: of the bootstrap.

    Raises:
        InputError: a task asks for a text that is not among ``texts``.
    """
    unique = list(dict.fromkeys(texts))
    pooled, _ = layer_vectors(model, unique, max_tokens=max_tokens)
    rows = {text: number for number, text in enumerate(unique)}
    last = pooled.shape[1] - 1
    found = {}
    for name, task in tasks.items():
        measured = {place: task(_lookup(rows, pooled[:, place])) for place in range(last + 1)}
        curve = LayerCurve(np.array([measured[place].value for place in range(last + 1)]), name, model.name)
        named = {"last": {name: measured[last]}} | {str(place): {name: measured[place]} for place in range(last)}
        found[name] = LayerSweep(curve, compare(named, seed=seed, meta={"model": model.name}))
    return found


def _lookup(rows: dict[str, int], vectors: np.ndarray) -> Callable[[Sequence[str]], np.ndarray]:
    def encode(texts: Sequence[str]) -> np.ndarray:
        missing = [text for text in texts if text not in rows]
        if missing:
            raise InputError(
                f"{len(missing)} texts of a task are not among those encoded, such as {missing[0][:60]!r}."
            )
        return np.asarray(vectors[[rows[text] for text in texts]])

    return encode
