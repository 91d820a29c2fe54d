"""Which vectors an encoder makes, as a short string: equal for equal content, wherever the files lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from polyhead.embed.folder import Recipe

if TYPE_CHECKING:
    from polyhead.pooling import Pooler

__all__ = ["fingerprint_of"]

_WHOLE = 1 << 20
_SAMPLES = 64
_SAMPLE_BYTES = 4096
_DESCRIBING = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def fingerprint_of(recipe: Recipe, layers: Sequence[int], max_tokens: int | None) -> str:
    """Digest of weights, configuration, tokenizer, pooling, layers and normalisation, in milliseconds.

    Of files above 1 MiB the size and 64 samples of 4 KiB are read: enough to tell trained weights apart, not enough
    to find a few changed bytes.

    Args:
        recipe: how vectors are made, with the folder (or the GGUF file) of the transformer.
        layers: layers whose heads are asked for.
        max_tokens: the caller's limit, if any.
    """
    digest = hashlib.sha256()
    settings = asdict(replace(recipe, pooler=None))
    for name in ("transformer", "pooler", "layer_weights", "token_weights"):
        del settings[name]
    for number, step in enumerate(recipe.steps):
        if step is not None:
            del settings["steps"][number]["folder"]
            _add_folder(digest, Path(step.folder))
    for folder in (recipe.pooler, recipe.layer_weights, recipe.token_weights):
        if isinstance(folder, str):
            _add_folder(digest, Path(folder))
        elif folder is not None:
            _add_pooler(digest, folder)
    settings["layers"], settings["limit"] = list(layers), max_tokens
    digest.update(json.dumps(settings, sort_keys=True).encode())
    transformer = Path(recipe.transformer)
    if transformer.is_file():
        _add_file(digest, transformer)
    else:
        _add_folder(digest, transformer)
    return digest.hexdigest()[:32]


def _add_pooler(digest: hashlib._Hash, pooler: Pooler) -> None:
    digest.update(json.dumps(pooler.describe(), sort_keys=True).encode())
    for name, weights in sorted(pooler.state_dict().items()):
        digest.update(name.encode())
        digest.update(weights.detach().cpu().contiguous().numpy().tobytes())


def _add_folder(digest: hashlib._Hash, folder: Path) -> None:
    files = [folder / name for name in _DESCRIBING if (folder / name).is_file()]
    for pattern in _WEIGHTS:
        weights = sorted(folder.glob(pattern))
        if weights:
            files += weights
            break
    for file in files:
        digest.update(file.name.encode())
        _add_file(digest, file)


def _add_file(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(str(size).encode())
    with file.open("rb") as content:
        if size <= _WHOLE:
            digest.update(content.read())
            return
        for sample in range(_SAMPLES):
            content.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(content.read(_SAMPLE_BYTES))
