"""What a model folder says about turning token states into vectors: a sentence-transformers folder or a plain one."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyhead.errors import InputError

if TYPE_CHECKING:
    from polyhead.pooling import Pooler

__all__ = ["DenseStep", "Recipe", "read_recipe"]

# sentence-transformers' names of poolings, in the order in which its older folders' switches are concatenated.
_POOLING_SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLING_NAMES = {
    "cls": "cls",
    "max": "max",
    "mean": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
_READ = ("Transformer", "Pooling", "Dense", "Normalize", "WeightedLayerPooling", "WordWeights")
# The one module of our own: it names a class of polyhead.pooling, never other code.
_OURS = "polyhead.pooling.sentence.PoolerModule"


@dataclass(frozen=True)
class DenseStep:
    """A linear layer with an activation after the pooling (sentence-transformers' ``Dense``)."""

    folder: str
    in_features: int
    out_features: int
    bias: bool
    activation: str
    residual: bool


@dataclass(frozen=True)
class Recipe:
    """How a folder wants its vectors made.

    Attributes:
        transformer: folder of the transformer itself.
        pooling: names of :data:`polyhead.pooling.POOLERS`, concatenated; ``None`` where the folder does not say.
        include_prompt: whether the prompt's tokens are pooled too.
        pooler: a pooler with weights, or the folder of one (a saved :class:`polyhead.pooling.sentence.PoolerModule`),
            that takes the place of ``pooling``; heads are pooled by ``pooling`` all the same.
        layer_weights: folder of the weights of layers, where they are blended before the pooling.
        token_weights: folder of a weight for each token of the vocabulary, by which the mean is taken.
        steps: what follows the pooling before the final normalisation; ``None`` stands for a normalisation.
        normalizes: whether vectors end with length 1.
        prompts: texts to put in front, by name.
        default_prompt: the name of the prompt to use where the caller names none.
        max_tokens: the folder's own limit, special tokens included.
        lowercase: whether texts are lower-cased first.
    """

    transformer: str
    pooling: tuple[str, ...] | None = None
    include_prompt: bool = True
    pooler: str | Pooler | None = None
    layer_weights: str | None = None
    token_weights: str | None = None
    steps: tuple[DenseStep | None, ...] = ()
    normalizes: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    max_tokens: int | None = None
    lowercase: bool = False

    def with_pooling(self, name: str | Pooler) -> Recipe:
        """The same with another pooling; what followed the folder's own pooling was made for that and is left out,
        except the final normalisation.

        Raises:
            InputError: the name is no pooling.
        """
        if not isinstance(name, str):
            return replace(self, pooler=copy.deepcopy(name), layer_weights=None, token_weights=None, steps=())
        if name not in _POOLING_NAMES.values():
            raise InputError(f"pooling = {name!r}, expected one of {', '.join(_POOLING_NAMES.values())}")
        return replace(self, pooling=(name,), pooler=None, layer_weights=None, token_weights=None, steps=())


def read_recipe(path: str | Path) -> Recipe:
    """Read a folder's recipe; needs no torch.

    Args:
        path: a model folder, or a single file (GGUF), which says nothing and gets the defaults.

    Raises:
        InputError: ``modules.json`` asks for something that is not understood, which would give other vectors.
    """
    folder = Path(path)
    modules_file = folder / "modules.json"
    if not modules_file.is_file():
        return Recipe(transformer=str(path))
    modules = _modules(modules_file)
    if modules[0][0] != "Transformer":
        raise _unknown(modules_file, modules[0][0], "a Transformer as the first module")
    transformer = folder / modules[0][1]
    pooling: tuple[str, ...] | None = None
    include_prompt = True
    pooler = layer_weights = token_weights = None
    steps: list[DenseStep | None] = []
    for kind, name in modules[1:]:
        settings = _json(folder / name / "config.json")
        if kind == "WeightedLayerPooling" and layer_weights is None and pooling is None:
            layer_weights = str(folder / name)
        elif kind == "WordWeights" and token_weights is None and pooling is None:
            token_weights = str(folder / name)
        elif kind == "PoolerModule" and layer_weights is None and token_weights is None and pooling is None:
            pooling, pooler = ("mean",), str(folder / name)
            include_prompt = bool(settings.get("include_prompt", True))
        elif kind == "Pooling" and pooling is None and not steps:
            pooling, include_prompt = _pooling(settings, folder / name), bool(settings.get("include_prompt", True))
        elif kind == "Dense" and pooling is not None:
            steps.append(_dense(settings, folder / name))
        elif kind == "Normalize" and pooling is not None:
            _expect_sentence(settings, folder / name)
            steps.append(None)
        else:
            raise _unknown(modules_file, kind, f"{', '.join(_READ)} in the order Transformer, Pooling, the others")
    if pooling is None:
        raise _unknown(modules_file, "no Pooling", "a Pooling after the Transformer")
    if token_weights is not None and (pooling != ("mean",) or not include_prompt):
        raise _unknown(modules_file, f"WordWeights before {', '.join(pooling)}", "a mean of all tokens after them")
    normalizes = False
    while steps and steps[-1] is None:
        steps.pop()
        normalizes = True
    own = _transformer_settings(transformer)
    whole = _json(folder / "config_sentence_transformers.json")
    return Recipe(
        transformer=str(transformer),
        pooling=pooling,
        include_prompt=include_prompt,
        pooler=pooler,
        layer_weights=layer_weights,
        token_weights=token_weights,
        steps=tuple(steps),
        normalizes=normalizes,
        prompts={str(name): str(text) for name, text in (whole.get("prompts") or {}).items()},
        default_prompt=whole.get("default_prompt_name"),
        max_tokens=own.get("max_seq_length"),
        lowercase=bool(own.get("do_lower_case", False)),
    )


def _modules(modules_file: Path) -> list[tuple[str, str]]:
    """Kind and folder of each module, in order."""
    listed = sorted(_json(modules_file, list), key=lambda entry: entry["idx"])
    found = []
    for entry in listed:
        package, _, kind = str(entry["type"]).rpartition(".")
        stock = package.split(".")[0] == "sentence_transformers" and kind in _READ
        if not stock and entry["type"] != _OURS:
            raise _unknown(
                modules_file, str(entry["type"]), f"sentence_transformers modules {', '.join(_READ)} and {_OURS}"
            )
        found.append((kind, str(entry.get("path", ""))))
    if not found:
        raise _unknown(modules_file, "no modules", "a Transformer and a Pooling")
    return found


def _pooling(settings: dict[str, Any], folder: Path) -> tuple[str, ...]:
    given = settings.get("pooling_mode")
    if given is None:
        given = [name for switch, name in _POOLING_SWITCHES.items() if settings.get(switch)] or ["mean"]
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if name not in _POOLING_NAMES:
            raise _unknown(folder / "config.json", f"pooling mode {name!r}", f"one of {', '.join(_POOLING_NAMES)}")
    return tuple(_POOLING_NAMES[name] for name in names)


def _dense(settings: dict[str, Any], folder: Path) -> DenseStep:
    _expect_sentence(settings, folder)
    return DenseStep(
        folder=str(folder),
        in_features=int(settings["in_features"]),
        out_features=int(settings["out_features"]),
        bias=bool(settings.get("bias", True)),
        activation=str(settings.get("activation_function", "torch.nn.modules.activation.Tanh")),
        residual=bool(settings.get("use_residual", False)),
    )


def _expect_sentence(settings: dict[str, Any], folder: Path) -> None:
    """A module may also work on token states or under other names; those would be other vectors than ours."""
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key) not in (None, "sentence_embedding"):
            raise _unknown(folder / "config.json", f"{key} = {settings[key]!r}", "'sentence_embedding'")


def _transformer_settings(transformer: Path) -> dict[str, Any]:
    """``sentence_bert_config.json``, or the like-named file that older releases wrote."""
    for file in [transformer / "sentence_bert_config.json", *sorted(transformer.glob("sentence_*_config.json"))]:
        settings = _json(file)
        if settings:
            return settings
    return {}


def _json(file: Path, kind: type = dict) -> Any:
    """Content of a JSON file; empty where there is none."""
    if not file.is_file():
        return kind()
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is not readable JSON ({error}); copy the model folder again") from error
    if not isinstance(content, kind):
        raise InputError(f"{file} holds {type(content).__name__}, expected {kind.__name__}; is it the right file?")
    return content


def _unknown(file: Path, given: str, expected: str) -> InputError:
    return InputError(
        f"{file} asks for {given}; Polyhead reads {expected}. "
        "To use the transformer with another pooling, give its own folder and say pooling=..."
    )
