"""What can be trained: folders, names, encoders and loaded models, all as one sentence-transformers model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead.embed.encoder import Encoder
from polyhead.embed.folder import read_recipe
from polyhead.errors import InputError, MissingExtraError, ModelNotFoundError
from polyhead.hub import resolve
from polyhead.model import HeadedModel
from polyhead.pooling import Pooler, pooler_for

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["headed", "needs_training", "trainable"]


def needs_training() -> None:
    """Say what to install where sentence-transformers or what its trainer needs is not there.

    Raises:
        MissingExtraError: one of them is missing.
    """
    try:
        import accelerate  # noqa: F401
        import datasets  # noqa: F401
        import sentence_transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"Training needs sentence-transformers, datasets and accelerate ({error}): pip install 'polyhead[train]'"
        ) from error


def trainable(
    model: str | Path | Encoder | HeadedModel | SentenceTransformer,
    pooling: str | Pooler | None = None,
    *,
    device: str | None = None,
    max_tokens: int | None = None,
) -> SentenceTransformer:
    """A model as sentence-transformers sees it, in float32, to be trained.

    Args:
        model: a folder (of sentence-transformers or plain transformers), a packaged name, a hub id, a Polyhead encoder
            or loaded model, or a ``SentenceTransformer``, which is given back as it is.
        pooling: a name of :data:`polyhead.pooling.POOLERS` or a pooler. What the folder had after its own pooling is
            left out then, except a final normalisation. None: the folder's; the mean where it has none, the last token
            where the model is causal.
        device: where to put it; None: CUDA where there is one.
        max_tokens: a lower limit on input length than the model's.

    Raises:
        ModelNotFoundError: no such model. InputError: GGUF weights, or a model without files.
    """
    needs_training()
    from sentence_transformers import SentenceTransformer

    if isinstance(model, Encoder):
        pooling = pooling or _pooling_of(model)
        max_tokens = max_tokens or model.max_tokens
    found = model if isinstance(model, SentenceTransformer) else _from_files(model, device)
    if pooling is not None:
        found = _with_pooling(found, pooling)
    if max_tokens is not None:
        if max_tokens > (found.max_seq_length or max_tokens):
            raise InputError(f"max_tokens = {max_tokens}; the model takes {found.max_seq_length}.")
        found.max_seq_length = max_tokens
    if device is not None:
        found.to(device)
    return found


def headed(model: SentenceTransformer) -> HeadedModel:
    """The Transformer in a sentence-transformers model, with its heads; it shares the weights."""
    return HeadedModel(model[0].auto_model, name="the model in training")


def _from_files(model: str | Path | Encoder | HeadedModel, device: str | None) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Transformer

    if isinstance(model, HeadedModel) and model.files is None:
        raise InputError("The model was given as a module, without files and so without tokenizer: give its folder.")
    if isinstance(model, HeadedModel):
        files = model.files
    else:
        files = resolve(model.name if isinstance(model, Encoder) else str(model))
    if files is None or files.gguf_file:
        raise InputError(f"'{model}' has GGUF weights, which are quantised and cannot be trained; give a folder.")
    loading = {"dtype": "float32"}
    path = Path(files.path)
    if (path / "modules.json").is_file():
        found = SentenceTransformer._load_with_module_classes(
            str(path), _own_modules(path), device=device, model_kwargs=loading
        )
    else:
        try:
            body = Transformer(str(path), model_kwargs=loading)
        except (OSError, ValueError, KeyError) as error:
            raise ModelNotFoundError(f"'{path}' could not be loaded as a Transformer: {error}") from error
        found = SentenceTransformer(modules=[body, *_default_pooling(body)], device=device)
    if isinstance(model, HeadedModel):
        found[0].auto_model.load_state_dict(model.module.state_dict())
    return found


def _own_modules(path: Path) -> dict[str, type]:
    """Polyhead's own pooling, which is no foreign code to be trusted; with a pooler of anyone else's it is left out."""
    from polyhead.pooling.sentence import PoolerModule

    name = f"{PoolerModule.__module__}.{PoolerModule.__qualname__}"
    listed = json.loads((path / "modules.json").read_text(encoding="utf-8"))
    for entry in listed:
        if entry["type"] == name:
            settings = json.loads((path / entry["path"] / "config.json").read_text(encoding="utf-8"))
            if not str(settings["pooler"]["pooler"]).startswith("polyhead.pooling."):
                return {}
    return {name: PoolerModule}


def _default_pooling(body: Any) -> list[Any]:
    """The mean, or the last token where the model is causal, as :class:`~polyhead.embed.Encoder` does."""
    from polyhead.embed.facts import _is_causal

    name = "last" if _is_causal(HeadedModel(body.auto_model)) else "mean"
    return pooler_for(name).stock_modules(body.get_embedding_dimension()) or []


def _with_pooling(model: SentenceTransformer, pooling: str | Pooler) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    from polyhead.pooling.sentence import PoolerModule

    pooler = pooling if isinstance(pooling, Pooler) else pooler_for(pooling)
    body, width = model[0], model[0].get_embedding_dimension()
    modules = [body, *(pooler.stock_modules(width) or [PoolerModule(pooler, width)])]
    if pooler.reads != "tokens":
        # The stock module that weighs layers does nothing, and says nothing, where it is not given all of them.
        body.auto_model.config.output_hidden_states = True
    if isinstance(list(model)[-1], Normalize):
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, device=str(model.device), prompts=dict(model.prompts))


def _pooling_of(encoder: Encoder) -> str | Pooler | None:
    """The encoder's pooling, where it is not the one its folder has."""
    if isinstance(encoder._recipe.pooler, Pooler):
        return copy.deepcopy(encoder._recipe.pooler)
    own = read_recipe(resolve(encoder.name).path).pooling
    asked = encoder._recipe.pooling
    return None if asked is None or asked == own or len(asked) > 1 else asked[0]
