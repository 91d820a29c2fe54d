"""Cut models: fewer layers and fewer coordinates, as folders of stock modules; and what each size is worth."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyhead.errors import InputError
from polyhead.papers import paper
from polyhead.structure import find_attention_layers

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["SizeReport", "grid_report", "shorten"]

_PROBE = ["Every layer of the model that is cut is compared with the whole one.", "Heads."]


@paper("2dmse")
def shorten(model: SentenceTransformer, layers: int | None = None, dim: int | None = None) -> SentenceTransformer:
    """The model cut after some layers, and its vectors after some coordinates.

    Later layers are gone and cost nothing. Coordinates are cut by a ``Dense`` of ones and zeros before a final
    normalisation, so plain sentence-transformers and :class:`~polyhead.embed.Encoder` open what it saves.

    Args:
        model: is left as it is; the cut one has weights of its own.
        layers: how many are kept; None: all.
        dim: how many coordinates are kept; None: all.

    Raises:
        InputError: more layers or coordinates than there are, or a model whose cut gives other states than its layer
            has (a norm after the last layer).

    Example:
        >>> from polyhead.training import shorten, trainable
        >>> small = shorten(trainable("all-MiniLM-L6-v2"), layers=3, dim=64)
        >>> small.encode(["cut"]).shape
        (1, 64)
    """
    from sentence_transformers import SentenceTransformer

    modules = [copy.deepcopy(module) for module in model]
    if layers is not None:
        _cut_layers(modules[0].auto_model, layers)
    found = SentenceTransformer(
        modules=modules,
        device=str(model.device),
        prompts=dict(model.prompts),
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )
    if layers is not None:
        _compare(model, found, layers)
    return found if dim is None else _cut_dim(found, dim)


def _cut_layers(body: Any, layers: int) -> None:
    attention = [at.module for at in find_attention_layers(body, "the model")]
    depth = int(body.config.num_hidden_layers)
    if not 1 <= layers <= depth:
        raise InputError(f"The model was to be cut to {layers} layers; it has {depth}.")
    for stack in body.modules():
        if isinstance(stack, nn.ModuleList) and len(stack) == depth and len(attention) == depth:
            inside = [any(part is own for part in block.modules()) for block, own in zip(stack, attention, strict=True)]
            if all(inside):
                del stack[layers:]
                body.config.num_hidden_layers = layers
                if getattr(body.config, "layer_types", None):
                    body.config.layer_types = body.config.layer_types[:layers]
                return
    raise InputError(f"{type(body).__name__} holds no list of its {depth} layers that could be cut.")


def _compare(whole: SentenceTransformer, cut: SentenceTransformer, layers: int) -> None:
    """A cut model must give what the whole one has after that layer."""
    from polyhead.training.layers import embed_layers

    training = whole.training
    with torch.no_grad():
        whole.eval()
        expected = embed_layers(whole, _features(whole), [layers])[layers]
        found = cut.eval()(_features(cut))["sentence_embedding"]
    whole.train(training)
    if not torch.allclose(expected, found, atol=1e-4):
        raise InputError(
            f"Cut to {layers} layers, {type(cut[0].auto_model).__name__} gives other states than its layer {layers} "
            "has: something stands behind the last layer, such as a norm. Its width can be cut, its depth cannot."
        )


def _features(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    features = model.preprocess(_PROBE)
    return {key: value.to(model.device) if hasattr(value, "to") else value for key, value in features.items()}


def _cut_dim(model: SentenceTransformer, dim: int) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    whole = model.get_embedding_dimension()
    assert whole is not None
    if not 1 <= dim <= whole:
        raise InputError(f"Vectors of {whole} were to be cut to {dim}.")
    modules = list(model)
    normalises = isinstance(modules[-1], Normalize)
    if normalises:
        modules.pop()
    choose = Dense(whole, dim, bias=False, activation_function=nn.Identity())
    with torch.no_grad():
        choose.linear.weight.copy_(torch.eye(dim, whole))
    return SentenceTransformer(
        modules=[*modules, choose, *([Normalize()] if normalises else [])],
        device=str(model.device),
        prompts=dict(model.prompts),
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )


@dataclass(frozen=True)
class SizeReport:
    """One size of a model.

    Attributes:
        layers, dim: what is kept.
        score: on the caller's measure.
        bytes: of a stored float32 vector.
        seconds: to encode the texts, the best of a few runs.
    """

    layers: int
    dim: int
    score: float
    bytes: int
    seconds: float


def grid_report(
    model: SentenceTransformer,
    score: Callable[[SentenceTransformer], float],
    layers: Sequence[int],
    dims: Sequence[int],
    texts: Sequence[str] = (),
    *,
    runs: int = 3,
) -> list[SizeReport]:
    """What every combination of depth and width is worth, and what it costs.

    Args:
        model: the whole one.
        score: of a cut model, higher is better.
        layers, dims: sizes to try.
        texts: encoded for the time, one batch; none: seconds are 0.
        runs: of the timing.
    """
    found = []
    for depth in layers:
        body = shorten(model, depth)
        seconds = min((_seconds(body, texts) for _ in range(runs)), default=0.0) if texts else 0.0
        for dim in dims:
            found.append(SizeReport(depth, dim, float(score(_cut_dim(body, dim))), 4 * dim, seconds))
    return found


def _seconds(model: SentenceTransformer, texts: Sequence[str]) -> float:
    started = time.perf_counter()
    model.encode(list(texts), batch_size=len(texts), show_progress_bar=False)
    return time.perf_counter() - started
