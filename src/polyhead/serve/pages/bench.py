"""The service's model with its heads, loaded once for the page that looks at them, and what was measured of it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from polyhead.errors import InputError, PolyheadError

if TYPE_CHECKING:
    from polyhead.headmap import HeadMap
    from polyhead.heads import Score
    from polyhead.model import HeadedModel
    from polyhead.serve.service import Service

__all__ = ["IMPORTANCE", "MEASURES", "Attention", "Bench", "Map", "token_texts"]

IMPORTANCE = "importance"
MOST_KEPT = 64
MOST_TOKENS = 64
PROFILE = "attention-"
MEASURES = {
    IMPORTANCE: "importance in this index",
    "attention-entropy": "entropy of the attention, in nats",
    "attention-broad": "how evenly it attends, 0 to 1",
    "attention-distance": "mean distance in tokens to what it attends to",
    "attention-previous": "attention to the token before",
    "attention-next": "attention to the token after",
    "attention-same": "attention of a token to itself",
    "attention-delimiter": "attention to special tokens",
    "attention-punctuation": "attention to punctuation",
    "output-norm": "length of what it writes",
    "info-flow-routes": "share of the token states that flows in through it",
    "q-composition": "its queries read one earlier head (weights alone)",
    "k-composition": "its keys read one earlier head (weights alone)",
    "v-composition": "its values read one earlier head (weights alone)",
}


class Place(NamedTuple):
    """A head's value in a map, its rank from 1, and among how many."""

    value: float
    rank: int
    of: int


@dataclass(frozen=True)
class Map:
    """A score of heads as the page shows it.

    Attributes:
        key: of :data:`MEASURES`.
        title, means, data: in words: what it is, what a high value says, and what it was measured on.
        layers: the model's own number of each row.
        values: ``[rows, heads]``; NaN where it is not defined.
    """

    key: str
    title: str
    means: str
    data: str
    layers: tuple[int, ...]
    values: np.ndarray

    def place(self, layer: int, head: int) -> Place | None:
        """Where a head stands; None where the map has no value of it."""
        if layer not in self.layers or not 0 <= head < self.values.shape[1]:
            return None
        value = float(self.values[self.layers.index(layer), head])
        known = self.values[np.isfinite(self.values)]
        return Place(value, int((known > value).sum()) + 1, known.size) if np.isfinite(value) else None


@dataclass(frozen=True)
class Attention:
    """What one head attends to in a text.

    Attributes:
        tokens: ``n`` of them, in words.
        weights: ``[n, n]``, rows are the tokens that look.
        left_out: tokens of the text beyond the first ``n``.
    """

    tokens: list[str]
    weights: np.ndarray
    left_out: int

    def most(self, k: int = 8) -> list[tuple[str, int, float]]:
        """The tokens looked at most: each with its position and the mean weight over all tokens that may see it."""
        seen = self.weights.sum(0) / np.maximum((self.weights > 0).sum(0), 1)
        return [(self.tokens[one], int(one), float(seen[one])) for one in np.argsort(-seen, kind="stable")[:k]]

    def strongest(self, row: int) -> tuple[str, float]:
        """What the token of a row looks at most, and with which weight."""
        column = int(self.weights[row].argmax())
        return self.tokens[column], float(self.weights[row, column])


class Bench:
    """Loads the service's model by its name, when it is first needed, and measures its heads.

    Args:
        service: whose model and index.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._lock = threading.RLock()
        self._model: HeadedModel | None = None
        self._maps: OrderedDict[tuple[str, tuple[str, ...]], Map] = OrderedDict()

    @contextmanager
    def model(self) -> Iterator[HeadedModel]:
        """The loaded model, for one thread at a time.

        Raises:
            InputError: it cannot be loaded by the service's name for it, or its heads cannot be read; says why.
        """
        with self._lock:
            if self._model is None:
                self._model = self._load()
            yield self._model

    def _load(self) -> HeadedModel:
        from polyhead.model import load_with_head

        try:
            return load_with_head(self._service.model)
        except (PolyheadError, OSError, ValueError) as error:
            raise InputError(
                f"The heads of '{self._service.model}' cannot be looked into here, because the model cannot be loaded "
                f"by that name: {error} Searching goes on as before; start the service with a folder, a packaged model "
                "(`polyhead models`) or a hub id to see its heads at work."
            ) from error

    def importance(self) -> Map | None:
        """What the index measured; None without an index that has it."""
        for found in self._service.heads()["maps"]:
            means = "the documents' vectors of this head are longer and differ more from each other"
            values = np.asarray(found["values"], dtype=float)
            return Map(IMPORTANCE, MEASURES[IMPORTANCE], means, found["data"], tuple(found["layers"]), values)
        return None

    def map(self, key: str, texts: tuple[str, ...]) -> Map:
        """One score, measured now or before.

        Raises:
            InputError: an unknown score, no importance to show, or a model that it cannot be measured on.
        """
        if key == IMPORTANCE:
            found = self.importance()
            if found is None:
                raise InputError("No index here has measured its heads; choose another score.")
            return found
        if key not in MEASURES:
            raise InputError(f"There is no score {key!r} on this page; choose one of {', '.join(MEASURES)}.")
        with self.model() as model:
            if (key, texts) not in self._maps:
                for found in _measured(model, key, texts):
                    self._maps[found.key, texts] = found
                while len(self._maps) > MOST_KEPT:
                    self._maps.popitem(last=False)
            return self._maps[key, texts]

    def at_hand(self, texts: tuple[str, ...]) -> list[Map]:
        """What the index measured, and everything measured so far on these texts, in the order of the list."""
        with self._lock:
            found = {key: one for (key, on), one in self._maps.items() if on == texts}
        importance = self.importance()
        if importance is not None:
            found[IMPORTANCE] = importance
        return [found[key] for key in MEASURES if key in found]

    def attention(self, layer: int, head: int, text: str) -> Attention:
        """What a head attends to in a text.

        Raises:
            InputError: no such head, or a text without a token.
        """
        import torch

        with self.model() as model:
            check_head(model, layer, head)
            total = len(model.tokenizer(text)["input_ids"])
            if not total:
                raise InputError("The text has no token to look at; type some words.")
            inputs = model.tokenize([text], truncation=True, max_length=MOST_TOKENS)
            with torch.inference_mode(), model.record("attention", layers=[layer]) as recording:
                model(**inputs)
            ids = inputs["input_ids"][0].tolist()
            weights = recording.layer_attention(layer)[0, head].double().cpu().numpy()[:, -len(ids) :]
            return Attention(token_texts(model, ids), weights, total - len(ids))


def check_head(model: HeadedModel, layer: int, head: int) -> None:
    """Raise InputError where the model has no such head."""
    if not (0 <= layer < model.layers and 0 <= head < model.attention_layers[layer].heads):
        raise InputError(
            f"There is no head {head} in layer {layer}; '{model.name}' has layers 0 to {model.layers - 1} with "
            f"{model.heads} heads each, counted from 0."
        )


def token_texts(model: HeadedModel, ids: list[int]) -> list[str]:
    """Each token as a person reads it; white space is shown as a sign."""
    return [
        text.strip() or text.replace("\n", "⏎").replace(" ", "␣") or "·"
        for text in (model.tokenizer.decode([one]) for one in ids)
    ]


def _measured(model: HeadedModel, key: str, texts: tuple[str, ...]) -> list[Map]:
    """The map of a score; all statistics of attention come from one pass."""
    if key.startswith(PROFILE):
        from polyhead.heads.attention_profile import attention_profile

        profile = attention_profile(model, texts, max_tokens=MOST_TOKENS * 4)
        return [_shown(f"{PROFILE}{name}", found) for name, found in profile.items()]
    score = _score(key)
    data: Any = list(texts) if score.needs == "texts" else None
    return [_shown(key, score.score(model, data))]


def _score(key: str) -> Score:
    """The cheap ones: of weights alone, or of a pass over a few texts."""
    from polyhead.heads import composition
    from polyhead.heads.info_flow_routes import InformationFlowRoutes
    from polyhead.heads.output_norm import OutputNorm

    kinds: list[type[Score]] = [
        OutputNorm,
        InformationFlowRoutes,
        composition.QComposition,
        composition.KComposition,
        composition.VComposition,
    ]
    return next(kind for kind in kinds if kind.name == key)()


def _shown(key: str, found: HeadMap) -> Map:
    data = found.data or "the weights alone"
    return Map(key, MEASURES[key], found.higher_means, data, tuple(range(found.shape[0])), found.values)
