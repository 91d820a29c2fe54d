"""Poolers as modules of sentence-transformers: trained there, saved as its own modules wherever the maths allows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.errors import InputError, MissingExtraError
from polyhead.pooling.base import Pooler, pooler_from

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.module import Module
except ImportError as error:
    raise MissingExtraError(
        "Poolers in sentence-transformers need it: pip install 'sentence-transformers>=6.2'"
    ) from error

__all__ = ["PoolerModule", "fold", "save"]


class PoolerModule(Module):
    """A :class:`~polyhead.pooling.Pooler` between a ``Transformer`` and what follows it, in place of ``Pooling``.

    Several vectors a text (``[batch, k, dim]``) are laid side by side in ``sentence_embedding``. A pooler of all
    layers asks the transformer for them by itself. Prompts, left padding and unpadded batches are understood.

    Args:
        pooler: the pooler, or its description.
        dim: of the model's states.
        include_prompt: whether a prompt's tokens are pooled.

    Raises:
        InputError: a pooler of head outputs, which sentence-transformers does not hand on.

    Example:
        >>> from sentence_transformers import SentenceTransformer
        >>> from sentence_transformers.sentence_transformer.modules import Transformer
        >>> from polyhead.hub import resolve
        >>> from polyhead.pooling import AttentionPooler
        >>> from polyhead.pooling.sentence import PoolerModule
        >>> body = Transformer(str(resolve("all-MiniLM-L6-v2").path))
        >>> model = SentenceTransformer(modules=[body, PoolerModule(AttentionPooler(384, heads=12), 384)])
        >>> model.encode(["heads", "tails"]).shape
        (2, 384)
    """

    def __init__(self, pooler: Pooler | dict[str, Any], dim: int, include_prompt: bool = True) -> None:
        super().__init__()
        self.pooler = pooler if isinstance(pooler, Pooler) else pooler_from(pooler, trust=True)
        if self.pooler.reads == "heads":
            raise InputError(
                f"{type(self.pooler).__name__} reads head outputs, which sentence-transformers does not hand on; "
                "fold it into the model and save that"
            )
        self.dim, self.include_prompt = dim, include_prompt
        self._tapped: dict[int, Tensor] = {}
        self._taps: Any = None

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Any]:
        """Put ``sentence_embedding [batch, output_dim]`` into the features."""
        skip = 0 if self.include_prompt else _prompt_length(features)
        states = self._states(features)
        if "cu_seq_lens_q" in features:
            states, mask, ids = _padded(states, features)
        else:
            ids, mask = features.get("input_ids"), features.get("attention_mask")  # type: ignore[assignment]
            if mask is None or mask.shape[-1] != states.shape[1]:
                mask = torch.ones(states.shape[:2], dtype=torch.int64, device=states.device)
        features["sentence_embedding"] = self.pooler(states, mask, skip, ids).flatten(1)
        return features

    def _states(self, features: dict[str, Any]) -> Tensor:
        if self.pooler.reads == "tokens":
            return features["token_embeddings"]
        if self.pooler.reads == "blocks":
            return self._block_states(features)
        if "all_layer_embeddings" not in features:
            raise InputError(
                f"{type(self.pooler).__name__} reads all layers, but the transformer gives the last only: load it with "
                "config_kwargs={'output_hidden_states': True}"
            )
        return torch.stack(tuple(features["all_layer_embeddings"]), dim=2)

    def _block_states(self, features: dict[str, Any]) -> Tensor:
        """Layers as the transformer gives them, heads as they were tapped on its way."""
        pooler: Any = self.pooler
        found = [features["all_layer_embeddings"][layer] for layer in pooler.layers]
        shape = found[0].shape[:2] if found else features["token_embeddings"].shape[:2]
        found += [self._tapped[layer].reshape(*shape, -1) for layer in pooler.head_layers]
        self._tapped.clear()
        return torch.cat(found, dim=-1)

    def on_model_ready(self, model: Any) -> None:
        """Ask the transformer for all layers, and for the heads, where the pooler reads them."""
        pooler: Any = self.pooler
        if pooler.reads in ("layers", "blocks"):
            model[0].auto_model.config.output_hidden_states = True
        if pooler.reads == "blocks" and pooler.head_layers and self._taps is None:
            from polyhead.model import load

            found = load(model[0].auto_model)
            self._taps = found.tap_heads(self._tapped.__setitem__, layers=pooler.head_layers)
            self._taps.__enter__()

    def get_embedding_dimension(self) -> int:
        """Numbers a text."""
        return self.pooler.output_dim(self.dim)

    def stock_modules(self) -> list[nn.Module] | None:
        """sentence-transformers' own modules that do the same; None where there are none."""
        return self.pooler.stock_modules(self.dim, self.include_prompt)

    def get_config_dict(self) -> dict[str, Any]:
        """Everything but weights."""
        return {"pooler": self.pooler.describe(), "dim": self.dim, "include_prompt": self.include_prompt}

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **options: Any) -> None:
        """Write settings and weights."""
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, subfolder: str = "", **options: Any) -> PoolerModule:
        """Read settings and weights; the base class would give fresh weights."""
        hub = {key: options[key] for key in ("token", "cache_folder", "revision", "local_files_only") if key in options}
        module = cls(**cls.load_config(model_name_or_path, subfolder=subfolder, **hub))
        if module.state_dict():
            cls.load_torch_weights(model_name_or_path, subfolder=subfolder, model=module, **hub)
        return module


def fold(model: SentenceTransformer) -> SentenceTransformer:
    """The same model with every pooler that stock modules can do replaced by these; encodes the same.

    Args:
        model: with :class:`PoolerModule` among its modules. It is left as it is and shares its weights.
    """
    modules: list[nn.Module] = []
    for module in model:
        stock = module.stock_modules() if isinstance(module, PoolerModule) else None
        modules += [module] if stock is None else stock
    folded = SentenceTransformer(
        modules=modules,
        device=str(model.device),
        prompts=dict(model.prompts),
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )
    return folded.train(model.training)


def save(model: SentenceTransformer, folder: str | Path) -> list[str]:
    """Save a model, folded into stock modules wherever it can be.

    Args:
        model: what to save.
        folder: where to.

    Returns:
        Names of the poolers that no stock module can do: none, and plain sentence-transformers opens the folder; else
        it needs Polyhead installed and ``trust_remote_code=True`` (:class:`polyhead.embed.Encoder` needs no flag). The
        folder's README says so too.
    """
    folder = Path(folder)
    folded = fold(model)
    folded.save(str(folder))
    custom = [type(module.pooler).__name__ for module in _poolers(folded)]
    if custom:
        note = (
            f"\n## How to load\n\nThe pooling of this model ({', '.join(custom)}) is no stock module. Install Polyhead "
            "and load with `SentenceTransformer(folder, trust_remote_code=True)`, or with `polyhead.embed.Encoder`.\n"
        )
        readme = folder / "README.md"
        readme.write_text((readme.read_text(encoding="utf-8") if readme.is_file() else "") + note, encoding="utf-8")
    return custom


def _poolers(modules: Iterable[nn.Module]) -> list[PoolerModule]:
    return [module for module in modules if isinstance(module, PoolerModule)]


def _prompt_length(features: dict[str, Any]) -> int:
    length = features.get("prompt_length", 0)
    return int(length.flatten()[0]) if isinstance(length, Tensor) else int(length or 0)


def _padded(states: Tensor, features: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """States, mask and ids of an unpadded batch ``[1, tokens of all, ...]``, one row a text, padded right."""
    ends = features["cu_seq_lens_q"].tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    rows = nn.utils.rnn.pad_sequence(list(states[0].split(lengths)), batch_first=True)
    index = torch.arange(rows.shape[1], device=states.device)
    mask = (index < torch.tensor(lengths, device=states.device).unsqueeze(1)).to(torch.int64)
    ids = features.get("input_ids")
    if ids is not None:
        ids = nn.utils.rnn.pad_sequence(list(ids.reshape(-1).split(lengths)), batch_first=True)
    return rows, mask, ids
