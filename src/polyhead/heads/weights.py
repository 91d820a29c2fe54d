"""The weights of every head, by role: what each head reads queries, keys and values with, and what it writes.

Nothing is taken on trust from a name. One probe run watches the projections, the norms around them and (where the model
has it) the attention call; a way of cutting a fused projection counts only if the values it gives are the values
that the heads really worked with, and a norm is folded only if its formula reproduces what it really put out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from polyhead.errors import InputError
from polyhead.heads._probe import Gain, Probe, projections_of
from polyhead.model import HeadedModel
from polyhead.structure import AttentionLayer

__all__ = ["LayerWeights", "ModelWeights", "read_weights"]


@dataclass(frozen=True)
class LayerWeights:
    """One layer's attention as matrices that act on row vectors: ``q = x @ query[h] + query_bias[h]``.

    Attributes:
        layer: index, from 0.
        query: ``[heads, hidden, key_dim]``.
        key: ``[kv_heads, hidden, key_dim]``.
        value: ``[kv_heads, hidden, value_dim]``.
        output: ``[heads, value_dim, hidden]``.
        query_bias, key_bias, value_bias: ``[heads or kv_heads, dim]``; zeros where the model has none.
        output_bias: ``[hidden]``.
        folded: whether the norm before attention (and after it, where there is one) is part of the matrices.
        inexact: what these matrices do not say exactly of the model, in words.
    """

    layer: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    query_bias: torch.Tensor
    key_bias: torch.Tensor
    value_bias: torch.Tensor
    output_bias: torch.Tensor
    folded: bool
    inexact: tuple[str, ...]

    @property
    def groups(self) -> int:
        """Query heads that share a key-value head."""
        return len(self.query) // len(self.key)

    def expanded(self) -> LayerWeights:
        """The same with a key and a value matrix for each query head (views of the shared ones, copied)."""
        if self.groups == 1:
            return self
        shared = ("key", "value", "key_bias", "value_bias")
        return replace(self, **{name: getattr(self, name).repeat_interleave(self.groups, 0) for name in shared})


@dataclass(frozen=True)
class ModelWeights:
    """Every layer's :class:`LayerWeights`, and the vocabulary's matrices.

    Attributes:
        model: name.
        layers: in the order of computation.
        embedding: ``[vocabulary, hidden]`` token embedding as stored, or None where there is none (vision).
        unembedding: ``[vocabulary, hidden]``, the rows that make logits; None where the model has no language-model
            head and is not known to share it with the embedding.
        final_norm: ``[hidden]`` gain of the norm before the unembedding, or None.
        centred: whether that norm subtracts the mean (LayerNorm).
        inexact: the layers' statements in one sentence, empty where the matrices say it all.
    """

    model: str
    layers: tuple[LayerWeights, ...]
    embedding: torch.Tensor | None
    unembedding: torch.Tensor | None
    final_norm: torch.Tensor | None
    centred: bool
    inexact: str

    @property
    def hidden(self) -> int:
        """Features of the residual stream."""
        return self.layers[0].query.shape[1]

    def to_logits(self, states: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[..., vocabulary]`` (or of the given ``rows``) of residual states ``[..., hidden]``.

        The final norm's gain is applied, its division by each state's size is not: the order of tokens is the same.

        Raises:
            InputError: the model has no unembedding.
        """
        matrix = self.require_unembedding()
        matrix = matrix if rows is None else matrix[rows]
        return self.before_unembedding(states) @ matrix.to(states.dtype).T

    def before_unembedding(self, states: torch.Tensor) -> torch.Tensor:
        """States as the unembedding sees them, up to their size: centred and gained as the final norm does."""
        if self.centred:
            states = states - states.mean(-1, keepdim=True)
        return states if self.final_norm is None else states * self.final_norm.to(states.dtype)

    def require_unembedding(self) -> torch.Tensor:
        """The unembedding, or an InputError that says how to get one."""
        if self.unembedding is None:
            raise InputError(
                f"'{self.model}' has no unembedding to read heads with: expected a language model. Load it with its "
                "head, load(name, lm_head=True)."
            )
        return self.unembedding


def read_weights(model: HeadedModel, *, fold: bool = True, dtype: torch.dtype = torch.float32) -> ModelWeights:
    """Read a model's weights head by head.

    Args:
        model: any loaded model.
        fold: make the norm that stands between the residual stream and the projections part of the matrices (gain,
            and for a LayerNorm the centring and bias), and the gain of a norm after the output projection part of
            ``output``. The division by each token's size stays out: it is one number for all heads of a layer.
        dtype: of the result; the model's own parameters are not touched.

    Raises:
        UnreadableModelError: a layer whose query, key and value projections could not be found, or do not give the
            values that its heads were seen to work with.

    Example:
        >>> weights = read_weights(load("all-MiniLM-L6-v2"))
        >>> weights.layers[0].query.shape, weights.layers[0].output.shape
        (torch.Size([12, 384, 32]), torch.Size([12, 32, 384]))
    """
    probe = Probe.run(model)
    with torch.no_grad():
        layers = tuple(_read_layer(model, at, probe, fold, dtype) for at in model.attention_layers)
    final = probe.final_gain(layers[0].query.shape[1])
    embedding, unembedding = _vocabulary(model.module, probe.norms_around(model.attention_layers[-1])[2])
    statements = dict.fromkeys(text for layer in layers for text in layer.inexact)
    return ModelWeights(
        model=model.name,
        layers=layers,
        embedding=embedding,
        unembedding=unembedding,
        final_norm=final.gain.to(dtype) if final else None,
        centred=bool(final and final.kind == "layer"),
        inexact="; ".join(statements),
    )


def _read_layer(model: HeadedModel, at: AttentionLayer, probe: Probe, fold: bool, dtype: torch.dtype) -> LayerWeights:
    parts = projections_of(model, at, probe)
    matrices = {role: weight.to(dtype) for role, (weight, _) in parts.items()}
    biases = {role: bias.to(dtype) for role, (_, bias) in parts.items()}
    output = model.output_weight(at.index).detach().to(dtype)
    given = model.output_bias(at.index)
    output_bias = output.new_zeros(output.shape[-1]) if given is None else given.detach().to(dtype)
    said = probe.position_or_norm(at, parts)
    for role, gain in probe.query_key_gains(at).items():
        matrices[role] = matrices[role] * gain.to(dtype).reshape(-1, 1, matrices[role].shape[-1])
    before, after, post = probe.norms_around(at)
    if post and at.index:
        said.append("norms stand after each residual sum, and what passes from layer to layer is changed by them")
    if fold and before is not None:
        for role in matrices:
            biases[role] = biases[role] + (before.bias.to(dtype) @ matrices[role]).reshape(biases[role].shape)
            matrices[role] = _read_through(before, matrices[role])
    if fold and after is not None:
        output = _write_through(after, output)
        output_bias = _write_through(after, output_bias)
    return LayerWeights(
        layer=at.index,
        query=matrices["q"],
        key=matrices["k"],
        value=matrices["v"],
        output=output,
        query_bias=biases["q"],
        key_bias=biases["k"],
        value_bias=biases["v"],
        output_bias=output_bias,
        folded=fold,
        inexact=tuple(said),
    )


def _read_through(norm: Gain, matrix: torch.Tensor) -> torch.Tensor:
    """``[heads, hidden, dim]`` that reads the stream before the norm."""
    matrix = norm.gain.to(matrix.dtype)[:, None] * matrix
    return matrix - matrix.mean(1, keepdim=True) if norm.kind == "layer" else matrix


def _write_through(norm: Gain, matrix: torch.Tensor) -> torch.Tensor:
    """``[..., hidden]`` as it leaves a norm after the output projection, but for the division by its size."""
    if norm.kind == "layer":
        matrix = matrix - matrix.mean(-1, keepdim=True)
    return matrix * norm.gain.to(matrix.dtype)


def _vocabulary(module: nn.Module, post: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    def weight_of(getter: str) -> torch.Tensor | None:
        try:
            found: Any = getattr(module, getter)()
        except (AttributeError, NotImplementedError, TypeError):
            return None
        weight = getattr(found, "weight", None)
        return weight.detach() if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None

    embedding, unembedding = weight_of("get_input_embeddings"), weight_of("get_output_embeddings")
    config = getattr(module, "config", None)
    if post:  # an encoder's masked-language head puts layers of its own between
        return embedding, None
    if unembedding is None and getattr(config, "tie_word_embeddings", False):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        unembedding = embedding if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None
    return embedding, unembedding
