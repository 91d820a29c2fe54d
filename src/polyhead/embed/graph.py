"""Token ids to dense and per-head vectors as one torch module, which also OpenVINO's graph is made from."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polyhead.embed.folder import DenseStep, Recipe
from polyhead.errors import InputError
from polyhead.pooling import Pooler, Reads, WeightedLayersPooler, pooler_for, pooler_from
from polyhead.pooling.base import weighted_sum

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["EncoderGraph"]


class EncoderGraph(nn.Module):
    """A headed model, its pooling and what follows it, up to (and without) the final normalisation.

    Args:
        model: the loaded model.
        pooling: names of poolings, concatenated for the dense vector; heads are pooled by the first.
        recipe: linear layers and inner normalisations after the pooling, and a pooler in place of the named ones.
        layers: indices of the layers whose heads are given, not negative.
    """

    def __init__(self, model: HeadedModel, pooling: Sequence[str], recipe: Recipe, layers: Sequence[int]) -> None:
        super().__init__()
        self.module = model.module
        self._model = model
        self.pooler = _pooler(recipe, pooling)
        self.head_pooler = pooler_for(pooling[0])
        self.steps = nn.ModuleList([_Normalize() if step is None else _Dense(step) for step in recipe.steps])
        self.layers = tuple(layers)
        self.with_heads = True

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, skip: int | Tensor = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Encode a batch.

        Args:
            input_ids: ``[batch, tokens]``.
            attention_mask: ``[batch, tokens]``.
            skip: tokens at the start of each text that are not pooled.

        Returns:
            Dense vectors ``[batch, dim]`` and, where ``with_heads`` is set, ``[batch, layers, heads, head_dim]``,
            both float32.
        """
        if not self.with_heads:
            return self._dense(input_ids, attention_mask, skip)
        taken: dict[int, Tensor] = {}

        def keep(layer: int, heads: Tensor) -> None:
            pooled = self.head_pooler(heads.reshape(*attention_mask.shape, -1), attention_mask, skip)
            taken[layer] = pooled.unflatten(-1, heads.shape[-2:]).float()

        with self._model.tap_heads(keep, layers=self.layers):
            dense = self._dense(input_ids, attention_mask, skip)
        return dense, torch.stack([taken[layer] for layer in self.layers], dim=1)

    def states(self, input_ids: Tensor, attention_mask: Tensor, reads: Reads = "tokens") -> Tensor:
        """The model's states, as :data:`polyhead.pooling.Reads` says: the last ones ``[batch, tokens, hidden]``, ..."""
        if reads == "heads":
            return self._head_states(input_ids, attention_mask)
        if reads == "blocks":
            return self._block_states(input_ids, attention_mask)
        asked = {"output_hidden_states": True} if reads == "layers" else {}
        outputs = self._model(input_ids=input_ids, attention_mask=attention_mask, **asked)
        states = getattr(outputs, "last_hidden_state", None)
        if states is None:
            raise InputError(
                f"{type(self.module).__name__} gives {type(outputs).__name__} without last_hidden_state, so there are "
                "no token states to pool; load the model without its task head (AutoModel)"
            )
        return torch.stack(tuple(outputs.hidden_states), dim=2) if reads == "layers" else states

    def _head_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        taken: dict[int, Tensor] = {}
        with self._model.tap_heads(taken.__setitem__):
            self._model(input_ids=input_ids, attention_mask=attention_mask)
        found = [taken[layer] for layer in sorted(taken)]
        shapes = sorted({tuple(each.shape[-2:]) for each in found})
        if len(shapes) > 1:
            raise InputError(
                f"{type(self.module).__name__} has layers of {shapes} (heads, head_dim), which differ; pool its states"
            )
        return torch.stack([each.reshape(*attention_mask.shape, *shapes[0]) for each in found], dim=2)

    def _block_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        taken: dict[int, Tensor] = {}
        pooler: Any = self.pooler
        layers, head_layers = pooler.layers, pooler.head_layers
        with self._model.tap_heads(taken.__setitem__, layers=head_layers):
            outputs = self._model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True)
        found = [outputs.hidden_states[layer] for layer in layers]
        found += [taken[layer].reshape(*attention_mask.shape, -1) for layer in head_layers]
        return torch.cat(found, dim=-1)

    def _dense(self, input_ids: Tensor, mask: Tensor, skip: int | Tensor) -> Tensor:
        states = self.states(input_ids, mask, self.pooler.reads)
        vectors = self.pooler(states, mask, skip, input_ids).flatten(1).float()
        for step in self.steps:
            vectors = step(vectors)
        return vectors


def _pooler(recipe: Recipe, names: Sequence[str]) -> Pooler:
    """What the recipe pools with."""
    if isinstance(recipe.pooler, Pooler):
        return recipe.pooler
    if recipe.pooler is not None:
        folder = Path(recipe.pooler)
        made = pooler_from(json.loads((folder / "config.json").read_text(encoding="utf-8"))["pooler"])
        if made.state_dict():
            made.load_state_dict({name.removeprefix("pooler."): value for name, value in _weights(folder).items()})
        return made
    tokens = pooler_for(names)
    if recipe.token_weights is not None:
        tokens = _TokenWeights(_weights(Path(recipe.token_weights))["emb_layer.weight"].flatten())
    if recipe.layer_weights is None:
        return tokens
    weights = _weights(Path(recipe.layer_weights))["layer_weights"]
    settings = json.loads((Path(recipe.layer_weights) / "config.json").read_text(encoding="utf-8"))
    blend = WeightedLayersPooler(int(settings["num_hidden_layers"]), tokens)
    blend.weights.data = torch.cat([weights.new_zeros(int(settings["layer_start"])), weights])
    return blend


class _TokenWeights(Pooler):
    """The mean with a weight for each token of the vocabulary, sentence-transformers' ``WordWeights``."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, states: Tensor, mask: Tensor, skip: int | Tensor = 0, ids: Tensor | None = None) -> Tensor:
        assert ids is not None
        weights = self.weights[ids] * mask  # type: ignore[index]
        return weighted_sum(states.float(), weights) / weights.sum(dim=1, keepdim=True).clamp(min=1e-9)


class _Normalize(nn.Module):
    def forward(self, vectors: Tensor) -> Tensor:
        return functional.normalize(vectors, dim=-1)


class _Dense(nn.Module):
    """Linear layer, activation and maybe a residual connection, with the weights of its folder."""

    def __init__(self, step: DenseStep) -> None:
        super().__init__()
        self.linear = nn.Linear(step.in_features, step.out_features, bias=step.bias)
        self.activation = _activation(step)
        self.residual: nn.Module | None = None
        if step.residual:
            same = step.in_features == step.out_features
            self.residual = nn.Identity() if same else nn.Linear(step.in_features, step.out_features, bias=False)
        self.load_state_dict(_weights(Path(step.folder)))

    def forward(self, vectors: Tensor) -> Tensor:
        result = self.activation(self.linear(vectors))
        return result if self.residual is None else result + self.residual(vectors)


def _activation(step: DenseStep) -> nn.Module:
    """The activation named in the folder; only torch's own, because a name could run anything."""
    package, _, name = step.activation.rpartition(".")
    found = getattr(importlib.import_module(package), name, None) if package.startswith("torch.nn") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise InputError(
            f"{step.folder}/config.json asks for the activation {step.activation!r}; expected a class of torch.nn"
        )
    return found()


def _weights(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").is_file():
        from safetensors.torch import load_file

        return load_file(folder / "model.safetensors")
    if (folder / "pytorch_model.bin").is_file():
        return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    raise InputError(f"{folder} has neither model.safetensors nor pytorch_model.bin; copy the model folder again")
