"""Vectors of several layers from one forward pass, and what objectives over layers have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from polyhead.errors import InputError
from polyhead.training.calls import Wrapper

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["LayerObjective", "embed_layers"]


class LayerObjective(Wrapper):
    """An objective over the vectors that a model would give if it ended after one layer or another.

    Layers are counted by how many are computed: the model's depth is its last, 0 the embeddings alone.
    """

    @abstractmethod
    def draw(self, depth: int) -> list[int]:
        """Layers whose vectors this step needs, of a model with ``depth`` layers; the last one first."""

    @abstractmethod
    def forward(self, layered: Sequence[Mapping[int, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The whole loss.

        Args:
            layered: one mapping a column of texts, ``{layer: [batch, dim]}``, in the order drawn.
            labels: ``[batch]`` classes or scores, or None.
        """


def embed_layers(model: SentenceTransformer, features: dict[str, Any], layers: Sequence[int]) -> dict[int, Tensor]:
    """The vectors a model gives after each of ``layers``, from one forward pass: ``{layer: [batch, dim]}``.

    Token states after the layer go through the modules that follow the Transformer (pooling, dense, normalisation).

    Args:
        model: whose first module is a ``Transformer``.
        features: of one batch, as ``model.preprocess`` gives them.
        layers: how many layers are computed, 0 (the embeddings alone) to the depth.

    Raises:
        InputError: a layer the model does not have, or a first module that does not tell its layers.
    """
    body, *rest = model
    config = body.auto_model.config
    asked = config.output_hidden_states
    config.output_hidden_states = True
    try:
        found = body(dict(features))
    finally:
        config.output_hidden_states = asked
    states = found.pop("all_layer_embeddings", None)
    if states is None:
        raise InputError(f"{type(body.auto_model).__name__} does not give the states of its layers.")
    if not all(0 <= layer < len(states) for layer in layers):
        raise InputError(f"Layers {list(layers)} were asked for; the model has 0 to {len(states) - 1}.")
    vectors = {}
    for layer in layers:
        part = {**found, "token_embeddings": states[layer]}
        for module in rest:
            part = module(part)
        vectors[layer] = part["sentence_embedding"]
    return vectors
