"""Objectives as losses of sentence-transformers: features of each column in, one number out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from polyhead.errors import InputError
from polyhead.training.calls import Wrapper, embedding_loss, takes
from polyhead.training.data import Kind
from polyhead.training.layers import LayerObjective, embed_layers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["ObjectiveLoss", "loss_for"]


class ObjectiveLoss(Wrapper):
    """A Polyhead objective under sentence-transformers' contract of a loss: ``loss(features, labels)``.

    One column of texts with labels is ``objective(vectors, labels)``; columns anchor, positive and negatives are
    ``objective(anchors, other=positives and negatives)``; two columns with scores are
    ``objective(first, scores, other=second)``.

    Args:
        model: what is trained.
        objective: an :class:`~polyhead.objectives.Objective` or anything called like one; a bare
            :class:`~polyhead.objectives.Loss` gets its own similarity; a
            :class:`~polyhead.training.layers.LayerObjective` gets the vectors of several layers.

    Example:
        >>> from polyhead.objectives import InfoNCE
        >>> from polyhead.training import ObjectiveLoss, trainable
        >>> model = trainable("all-MiniLM-L6-v2")
        >>> loss = ObjectiveLoss(model, InfoNCE())
        >>> loss([model.preprocess(["one", "two"]), model.preprocess(["first", "second"])], None).ndim
        0
    """

    def __init__(self, model: SentenceTransformer, objective: nn.Module) -> None:
        super().__init__(objective)
        self.model = model

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None) -> Tensor:
        """The loss of a batch; ``sentence_features`` has one entry a column of texts."""
        columns = [dict(features) for features in sentence_features]
        if isinstance(self.objective, LayerObjective):
            wanted = self.objective.draw(int(self.model[0].auto_model.config.num_hidden_layers))
            layered = [embed_layers(self.model, features, wanted) for features in columns]
            with _full_precision(self.model.device.type):
                whole = [{layer: _floats(value) for layer, value in column.items()} for column in layered]
                return cast(Tensor, self.objective(whole, labels))
        vectors = [self.model(features)["sentence_embedding"] for features in columns]
        return self.compute_loss_from_embeddings(vectors, labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None) -> Tensor:
        """The loss of vectors ``[batch, dim]``, one tensor a column, as they came out of the model.

        It is computed in float32 at least, under autocast too: similarities lose what they are compared by in less.
        """
        with _full_precision(self.model.device.type):
            return embedding_loss(self.objective, [_floats(vectors) for vectors in embeddings], labels)


def _full_precision(device: str) -> torch.autocast:
    return torch.autocast(device, enabled=False)


def _floats(vectors: Tensor) -> Tensor:
    return vectors.float() if vectors.dtype in (torch.float16, torch.bfloat16) else vectors


def loss_for(objective: Any, model: SentenceTransformer, kind: Kind) -> nn.Module:
    """The loss that trains ``model``: of an objective, of what binds itself to a model, or sentence-transformers' own.

    Args:
        objective: a Polyhead objective or loss; an object with ``bind(model) -> nn.Module`` such as a distillation; a
            loss of sentence-transformers, made with this model or as a function of it.
        model: what is trained.
        kind: of the training data.

    Raises:
        InputError: an objective that does not go with data of that kind, or no objective at all.
    """
    if hasattr(objective, "bind"):
        return cast(nn.Module, objective.bind(model))
    if isinstance(objective, nn.Module) and hasattr(objective, "model"):
        if objective.model is not model:
            raise InputError("The loss was made with another model than the one to train; make it with that one.")
        return objective
    if isinstance(objective, nn.Module):
        _check(objective, kind)
        return ObjectiveLoss(model, objective)
    if callable(objective):
        return cast(nn.Module, objective(model))
    raise InputError(
        f"The objective is {type(objective).__name__}; expected an Objective, a Loss, a distillation, or a loss of "
        "sentence-transformers."
    )


def _check(objective: nn.Module, kind: Kind) -> None:
    # A bare loss is called as the Objective around it.
    taken, name = takes(Wrapper(objective)), type(objective).__name__
    if kind == "texts":
        raise InputError(f"{name} compares texts; alone they do not say which belong together: add a label column.")
    if kind in ("pairs", "triplets") and not taken & {"other", "y"}:
        raise InputError(f"{name} learns from labels; the data has {kind}. Give columns text and label.")
    if kind == "scored" and "other" not in taken:
        raise InputError(f"{name} does not take scores; give pairs without score, or an Objective of graded pairs.")
    if kind == "labelled" and not taken & {"labels", "relation"}:
        raise InputError(f"{name} learns from pairs; the data has labels. Give columns anchor and positive.")
