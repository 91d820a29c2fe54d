"""What must be known of a model to tokenize for it and to shape its results; kept on disk, so that torch rests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from polyhead.embed.folder import Recipe
from polyhead.errors import InputError, UnreadableModelError

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["ModelFacts", "learn_facts"]

# Tokenizers of models without a limit of their own say 1e30.
_NO_LIMIT = 1_000_000


@dataclass(frozen=True)
class ModelFacts:
    """Facts of one model under one recipe.

    Attributes:
        dim: length of the dense vector.
        layers: the layers whose heads are given, counted from 0.
        heads: query heads in each of them.
        head_dim: size of a head's output.
        pooling: names of the poolings.
        max_tokens: the longest input.
        pad_id: id that fills batches up.
        tokenizer: the tokenizer as ``tokenizer.json`` content.
    """

    dim: int
    layers: tuple[int, ...]
    heads: int
    head_dim: int
    pooling: tuple[str, ...]
    max_tokens: int
    pad_id: int
    tokenizer: str

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelFacts:
        """From :meth:`to_json`'s text."""
        content = json.loads(text)
        return cls(**{**content, "layers": tuple(content["layers"]), "pooling": tuple(content["pooling"])})


def learn_facts(model: HeadedModel, recipe: Recipe, layers: Sequence[int], max_tokens: int | None) -> ModelFacts:
    """Learn a loaded model's facts; runs it on four tokens.

    Args:
        model: the model, in float32.
        recipe: how its folder wants vectors made.
        layers: layers asked for; negative ones count from the end.
        max_tokens: the caller's limit on input length, if any.

    Raises:
        InputError: a layer that the model does not have, layers of different shapes, no fast tokenizer.
    """
    from polyhead.embed.graph import EncoderGraph

    chosen = _layers(model, layers)
    first = model.attention_layers[chosen[0]]
    pooling = recipe.pooling or (("last",) if _is_causal(model) else ("mean",))
    tokenizer = _serialised(model, recipe.lowercase)
    graph = EncoderGraph(model, pooling, recipe, chosen)
    dense, _ = _probe(graph, model)
    pad_id = next(
        (
            each
            for each in (model.tokenizer.pad_token_id, getattr(model.config, "pad_token_id", None))
            if each is not None
        ),
        0,
    )
    return ModelFacts(
        dim=int(dense.shape[-1]),
        layers=chosen,
        heads=first.heads,
        head_dim=first.head_dim,
        pooling=tuple(pooling),
        max_tokens=_max_tokens(model, recipe, max_tokens),
        pad_id=int(pad_id),
        tokenizer=tokenizer,
    )


def _layers(model: HeadedModel, layers: Sequence[int]) -> tuple[int, ...]:
    count = len(model.attention_layers)
    for layer in layers:
        if not -count <= layer < count:
            raise InputError(f"layer {layer} was asked for; {model.name} has {count}: give {-count} to {count - 1}")
    chosen = tuple(layer % count for layer in layers)
    shapes = {(model.attention_layers[layer].heads, model.attention_layers[layer].head_dim) for layer in chosen}
    if len(shapes) != 1:
        raise InputError(
            f"the layers {list(layers)} of {model.name} differ in (heads, head_dim): {sorted(shapes)}; "
            "encode them one by one"
        )
    return chosen


def _ids(model: HeadedModel, last: int) -> Any:
    import torch

    return torch.tensor([[5, 6, 7, last]], device=model.device)


def _probe(graph: Any, model: HeadedModel) -> Any:
    import torch

    ids = _ids(model, 8)
    with torch.inference_mode():
        return graph(ids, torch.ones_like(ids))


def _is_causal(model: HeadedModel) -> bool:
    """Whether a token's state does not depend on the tokens after it: asked of the model itself, not of its name."""
    import torch

    with torch.inference_mode():
        states = []
        for last in (8, 9):
            ids = _ids(model, last)
            states.append(model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, :-1])
    return bool(torch.equal(states[0], states[1]))


def _serialised(model: HeadedModel, lowercase: bool) -> str:
    """The tokenizer as transformers builds it: the file alone can lack settings that are made elsewhere."""
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnreadableModelError(
            f"{model.name} has the tokenizer {type(model.tokenizer).__name__}, which the tokenizers library cannot "
            "run; convert it to a fast tokenizer (tokenizer.json) first"
        )
    content = json.loads(backend.to_str())
    # Settings of an earlier use; they would cut texts in silence.
    content["truncation"] = content["padding"] = None
    if lowercase and "Lowercase" not in json.dumps(content["normalizer"]):
        normalizers = [{"type": "Lowercase"}] + ([content["normalizer"]] if content["normalizer"] else [])
        content["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    return json.dumps(content)


def _max_tokens(model: HeadedModel, recipe: Recipe, asked: int | None) -> int:
    own = [recipe.max_tokens] if recipe.max_tokens else [getattr(model.tokenizer, "model_max_length", None)]
    limits = [*own, getattr(model.config, "max_position_embeddings", None), _position_rows(model)]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < _NO_LIMIT]
    if asked is None:
        return min(known, default=512)
    if asked < 1 or (known and asked > min(known)):
        raise InputError(f"max_tokens = {asked}; {model.name} takes 1 to {min(known, default=_NO_LIMIT)}")
    return asked


def _position_rows(model: HeadedModel) -> int | None:
    """Usable rows of a learned position table whose first rows are kept for padding (the RoBERTa family)."""
    import torch

    for name, module in model.module.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - reserved
    return None
