"""How far a head's weights moved between a model and a tuned one: which heads to tune, without data (alps)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.heads.base import Needs, Progress, Score
from polyhead.heads.weights import read_weights
from polyhead.model import HeadedModel
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.headmap import HeadMap

__all__ = ["WeightShift"]

Distance = Literal["wasserstein", "js", "cosine"]


@paper("alps")
@dataclass
class WeightShift(Score):
    """Distance of each head's query, key and value weights between two models of one shape.

    A head's weights are flattened to one vector and made a distribution by softmax, ``p`` in the model and ``q`` in the
    tuned one. "wasserstein" is the Wasserstein-1 distance between the values of p and those of q (the paper's sPAD; of
    equally many values, the mean difference once both are sorted), "js" the Jensen-Shannon divergence of p and q place
    by place, "cosine" one less the cosine of the weights themselves. Heads that share a key-value head share its part.

    Args:
        distance: which.

    Example:
        >>> from polyhead import load
        >>> base, tuned = load("all-MiniLM-L6-v2"), load("all-MiniLM-L6-v2")
        >>> tuned.attention_layers[2].module.value.weight.data[:32] += 0.1  # head 0 of layer 2
        >>> WeightShift().score(base, tuned).top(1)
        [(2, 0)]
    """

    distance: Distance = "wasserstein"

    name: ClassVar[str] = "weight-shift"
    summary: ClassVar[str] = "how far the head's weights are from those of a tuned model"
    needs: ClassVar[Needs] = "other"
    higher_means: ClassVar[str] = "the head's weights moved further in tuning"

    def score(self, model: HeadedModel, data: Any = None, *, progress: Progress | None = None) -> HeadMap:
        """See :class:`Score`; data is the tuned model, a :class:`HeadedModel`."""
        if self.distance not in get_args(Distance):
            raise InputError(f"distance is {self.distance!r}, expected one of {', '.join(get_args(Distance))}.")
        if not isinstance(data, HeadedModel):
            raise InputError(
                f"'{self.name}' was given {type(data).__name__}; expected the tuned model, loaded as the first."
            )
        values = np.full((model.layers, model.heads), np.nan)
        pairs = zip(_heads_of(model), _heads_of(data), strict=False)
        if model.layers != data.layers:
            raise InputError(f"'{model.name}' has {model.layers} layers, '{data.name}' {data.layers}: of one shape.")
        for layer, (base, tuned) in enumerate(pairs):
            if base.shape != tuned.shape:
                raise InputError(
                    f"Layer {layer} of '{model.name}' has weights {list(base.shape)} by head, of '{data.name}' "
                    f"{list(tuned.shape)}; expected two models of one shape."
                )
            values[layer, : len(base)] = self._distances(base, tuned).numpy()
            if progress is not None:
                progress(layer + 1, model.layers)
        return self._map(values, model, data.name)

    def _distances(self, base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
        """``[heads]`` from ``[heads, weights]`` float64."""
        if self.distance == "cosine":
            return 1 - torch.nn.functional.cosine_similarity(base, tuned, dim=-1)
        p, q = torch.softmax(base, -1), torch.softmax(tuned, -1)
        if self.distance == "wasserstein":
            return (p.sort(-1).values - q.sort(-1).values).abs().mean(-1)
        middle = (p + q) / 2
        return 0.5 * ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)).clamp(min=0)


def _heads_of(model: HeadedModel) -> list[torch.Tensor]:
    """Query, key and value weights of every head in one row, ``[heads, weights]`` float64, a layer each."""
    found = []
    for layer in read_weights(model, fold=False).layers:
        own = layer.expanded()
        found.append(torch.cat([part.flatten(1).double() for part in (own.query, own.key, own.value)], dim=1))
    return found
