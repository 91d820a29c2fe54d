"""An encoder as a sentence-transformers model: to save it as a folder that plain sentence-transformers opens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead.embed.facts import ModelFacts
from polyhead.embed.folder import DenseStep, Recipe
from polyhead.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

__all__ = ["sentence_transformer"]


def sentence_transformer(recipe: Recipe, facts: ModelFacts) -> SentenceTransformer:
    """A sentence-transformers model on the CPU that encodes as the recipe says.

    Args:
        recipe: how vectors are made.
        facts: of the model.

    Raises:
        MissingExtraError: sentence-transformers is not installed.
        InputError: a GGUF file, which it cannot read.
    """
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize, Transformer
    except ImportError as error:
        raise MissingExtraError("This needs sentence-transformers: pip install 'sentence-transformers>=6.2'") from error
    if Path(recipe.transformer).is_file():
        raise InputError(
            f"{recipe.transformer} is a GGUF file, which sentence-transformers does not read; give the model's folder."
        )
    # Without the model's own type: what is encoded here in float32 is to be the same there.
    body = Transformer(
        recipe.transformer,
        max_seq_length=facts.max_tokens,
        do_lower_case=recipe.lowercase,
        model_kwargs={"dtype": "float32"},
    )
    modules = [body, *_pooling(recipe, facts, body.get_embedding_dimension()), *map(_step, recipe.steps)]
    if recipe.normalizes:
        modules.append(Normalize())
    if recipe.layer_weights is not None:
        body.auto_model.config.output_hidden_states = True
    return SentenceTransformer(
        modules=modules, device="cpu", prompts=dict(recipe.prompts), default_prompt_name=recipe.default_prompt
    )


def _pooling(recipe: Recipe, facts: ModelFacts, dim: int) -> list[Any]:
    from sentence_transformers.sentence_transformer.modules import Pooling, WeightedLayerPooling, WordWeights

    from polyhead.pooling import pooler_for
    from polyhead.pooling.sentence import PoolerModule

    if isinstance(recipe.pooler, str):
        return [PoolerModule.load(recipe.pooler)]
    if recipe.pooler is not None:
        return [PoolerModule(recipe.pooler, dim, recipe.include_prompt)]
    before: list[Any] = []
    if recipe.layer_weights is not None:
        before.append(WeightedLayerPooling.load(recipe.layer_weights))
    if recipe.token_weights is not None:
        before.append(WordWeights.load(recipe.token_weights))
    modes = [pooler_for(name).stock for name in facts.pooling]
    return [*before, Pooling(dim, modes, recipe.include_prompt)]


def _step(step: DenseStep | None) -> Any:
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    return Normalize() if step is None else Dense.load(step.folder)
