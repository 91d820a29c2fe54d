"""A model with its heads: load any Hugging Face Transformer, and record what each head gives."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyhead.errors import InputError, MissingExtraError, UnreadableModelError
from polyhead.gguf_tokenizer import gguf_tokenizer
from polyhead.gguf_weights import reading_weights
from polyhead.hub import ResolvedModel, resolve
from polyhead.recording import Recording, attention_hooks, attention_taps, token_hooks
from polyhead.structure import AttentionLayer, find_attention_layers
from polyhead.surgery import PRUNED_FILE, read_pruned, remove_heads
from polyhead.tap import AttentionCall

__all__ = ["AttentionCall", "AttentionLayer", "HeadedModel", "Recording", "load", "load_with_head"]

RECORDABLE = ("heads", "tokens", "attention")
# transformers makes an empty tokenizer up where a folder has none of these.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "tokenizer_config.json",
)
HeadCallback = Callable[[int, torch.Tensor], "torch.Tensor | None"]


def load(
    name_or_path_or_module: str | Path | nn.Module,
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    tower: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    lm_head: bool = False,
) -> HeadedModel:
    """Load a Transformer and find its heads; the model's code and weights are not changed.

    Args:
        name_or_path_or_module: a folder, a ``.gguf`` file, a packaged name (``polyhead models``), a hub id or a module.
        dtype: "float32", ``torch.bfloat16``, ...; None keeps the checkpoint's own (a module's as it is).
        device: where to put it; None leaves it on the CPU (a module where it is).
        tower: "text" or "vision" of a two-tower model, "encoder" or "decoder" of an encoder-decoder (default encoder).
        revision: branch, tag or commit on the hub.
        trust_remote_code: let a hub model run its own code.
        lm_head: load a decoder with its language-model head, so that calling it gives logits.

    Raises:
        ModelNotFoundError: no such model.
        UnreadableModelError: no attention heads were found in it; says what was looked for.
        InputError: a two-tower model without ``tower``, or a tower it does not have.

    Example:
        >>> model = load("all-MiniLM-L6-v2")
        >>> model.layers, model.heads, model.head_dim
        (6, 12, 32)
        >>> with model.record("heads") as recording, torch.no_grad():
        ...     _ = model(**model.tokenize(["Every head speaks for itself."]))
        >>> recording.heads.shape
        torch.Size([1, 6, 12, 8, 32])
    """
    resolved = None
    if isinstance(name_or_path_or_module, nn.Module):
        module, name = name_or_path_or_module, type(name_or_path_or_module).__name__
    else:
        name = str(name_or_path_or_module)
        resolved = resolve(name, revision=revision)
        module = _from_files(resolved, dtype, trust_remote_code, lm_head)
    if device is not None or (dtype is not None and resolved is None):
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        module = module.to(device=device, dtype=kind if resolved is None else None)
    part = _tower_of(module, tower, name)
    if resolved is not None:
        _cut_pruned(part, name, resolved)
    return HeadedModel(part, name=name, files=resolved, trust_remote_code=trust_remote_code)


def load_with_head(name: str) -> HeadedModel:
    """A decoder with its language-model head, so that it can be judged by what it predicts; anything else as it is.

    Raises:
        ModelNotFoundError, UnreadableModelError: see :func:`load`.
    """
    resolved = resolve(name)
    decoder = resolved.gguf_file is not None
    if not decoder and not (Path(resolved.path) / "modules.json").is_file():
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(resolved.path)
        decoder = any(kind.endswith("ForCausalLM") for kind in config.architectures or ())
    return load(name, lm_head=decoder)


class HeadedModel:
    """A Transformer whose heads are known. Call it as you would call the model; use :meth:`record` to see the heads.

    Attributes:
        module: the wrapped model (one tower of it, where it has several).
        name: as it was asked for.
        attention_layers: one :class:`AttentionLayer` a layer, in the order of computation.
        layers: how many.
        heads, kv_heads, head_dim: of the widest layer; where layers differ, ``attention_layers`` tells each.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str | None = None,
        files: ResolvedModel | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.module = module
        self.name = name or type(module).__name__
        self.files = files
        self._trust_remote_code = trust_remote_code
        self.attention_layers = find_attention_layers(module, self.name)
        self.layers = len(self.attention_layers)
        self.heads = max(layer.heads for layer in self.attention_layers)
        self.kv_heads = max(layer.kv_heads for layer in self.attention_layers)
        self.head_dim = max(layer.head_dim for layer in self.attention_layers)

    def __repr__(self) -> str:
        return (
            f"HeadedModel({self.name!r}: {type(self.module).__name__}, {self.layers} layers x {self.heads} heads of "
            f"{self.head_dim}, {self.kv_heads} key-value heads)"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's forward pass, unchanged."""
        return self.module(*args, **kwargs)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.module.config

    @property
    def device(self) -> torch.device:
        """Where the first parameter is."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter."""
        return next(self.module.parameters()).dtype

    @property
    def hidden_size(self) -> int:
        """Features of a token state: what the output projections give."""
        return int(self.output_weight(0).shape[-1])

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model's files.

        Raises:
            InputError: the model was given as a module, or its files hold no tokenizer (a vision tower).
        """
        if self.files is None:
            raise InputError(f"'{self.name}' was given as a module, without files: tokenize with your own tokenizer.")
        from transformers import AutoTokenizer

        folder, gguf = _transformer_folder(self.files), self.files.gguf_file
        if gguf is None and not any((Path(folder) / file).is_file() for file in TOKENIZER_FILES):
            raise InputError(
                f"'{self.name}' has no tokenizer: {folder} holds none of {', '.join(TOKENIZER_FILES)}. Save the "
                "tokenizer beside the model, or tokenize with your own."
            )
        try:
            if gguf is not None:
                return gguf_tokenizer(folder, gguf)
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=self._trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"'{self.name}' has no tokenizer that could be read from {folder}: {error}") from error

    def tokenize(self, texts: Sequence[str], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Token ids and mask of ``texts``, padded together, on the model's device."""
        batch = self.tokenizer(list(texts), return_tensors="pt", padding=len(texts) > 1, **kwargs)
        return {key: value.to(self.device) for key, value in batch.items()}

    def output_weight(self, layer: int) -> torch.Tensor:
        """``W_O`` of a layer, ``[heads, head_dim, hidden]``: ``sum_h z_h @ W_O[h] + bias`` is the attention output."""
        at = self.attention_layers[layer]
        projection = at.output_projection
        weight = projection.weight
        assert isinstance(weight, torch.Tensor)
        matrix = weight if hasattr(projection, "nf") else weight.T  # Conv1D keeps [in, out], Linear [out, in].
        return matrix.reshape(at.heads, at.head_dim, -1)

    def output_bias(self, layer: int) -> torch.Tensor | None:
        """Bias of a layer's output projection, ``[hidden]``, or None."""
        return getattr(self.attention_layers[layer].output_projection, "bias", None)

    @contextmanager
    def tap_heads(self, callback: HeadCallback, *, layers: Sequence[int] | None = None) -> Iterator[None]:
        """Have ``callback(layer, z)`` called in every forward pass of this thread, while the block runs.

        ``z`` is the layer's head output ``[batch, tokens, heads, head_dim]``, before the output projection, part of
        the autograd graph. If the callback returns a tensor of that shape, the model goes on with it instead; this is
        the one place where heads are recorded, gated and steered.

        Raises:
            InputError: a layer the model does not have.
        """
        chosen = self._chosen(layers)
        thread = threading.get_ident()
        counts: dict[int, int] = {}
        slots = {(id(layer.output_projection), layer.call): layer for layer in self.attention_layers}
        calls = Counter(of for of, _ in slots)

        def restart(*_: Any) -> None:
            if threading.get_ident() == thread:
                counts.clear()

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if threading.get_ident() != thread:
                return None
            # Anew after the last one too: sentence-transformers calls `forward` itself, past the hook that restarts.
            call = (counts.get(id(module), -1) + 1) % calls[id(module)]
            counts[id(module)] = call
            layer = slots.get((id(module), call))
            if layer is None or layer.index not in chosen:
                return None
            given = args[0]
            z = given.unflatten(-1, (layer.heads, layer.head_dim))
            changed = callback(layer.index, z)
            return None if changed is None else (changed.flatten(-2), *args[1:])

        handles = [self.module.register_forward_pre_hook(restart)]
        try:
            for projection in {id(at.output_projection): at.output_projection for at in self.attention_layers}.values():
                handles.append(projection.register_forward_pre_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def tap_attention(
        self,
        watch: Callable[[int, AttentionCall], torch.Tensor | None] | None = None,
        *,
        prepare: Callable[[int, AttentionCall], AttentionCall | None] | None = None,
        layers: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """See and change attention from inside, in every forward pass of this thread while the block runs.

        Args:
            watch: called as ``watch(layer, call)`` after the kernel; a tensor it returns, ``[batch, tokens, heads,
                value_dim]``, takes the place of the head outputs.
            prepare: called as ``prepare(layer, call)`` before the kernel; an :class:`AttentionCall` it returns
                (``dataclasses.replace(call, query=...)``) is computed instead.
            layers: which layers; None for all.

        Raises:
            UnreadableModelError: one of the layers does not attend through transformers' attention interface.
            InputError: a layer the model does not have.
        """
        with attention_taps(self, watch, prepare, set(self._chosen(layers))):
            yield

    @contextmanager
    def record(self, *what: str, layers: Sequence[int] | None = None) -> Iterator[Recording]:
        """Record the forward passes of this thread while the block runs; the recording keeps the last one.

        Args:
            what: any of "heads", "tokens", "attention".
            layers: which layers' heads and attention; None for all. Negative numbers count from the last.

        Raises:
            InputError: something else was asked for, or a layer the model does not have.
        """
        if not what or any(kind not in RECORDABLE for kind in what):
            raise InputError(f"record{what} was asked for, expected one or more of {', '.join(RECORDABLE)}.")
        chosen = self._chosen(layers)
        recording = Recording(what, chosen)
        with ExitStack() as stack:
            if "heads" in what:
                stack.enter_context(self.tap_heads(recording._add_heads, layers=chosen))
            if "tokens" in what:
                stack.enter_context(token_hooks(self, recording))
            if "attention" in what:
                stack.enter_context(attention_hooks(self, recording, set(chosen)))
            yield recording

    def _chosen(self, layers: Sequence[int] | None) -> list[int]:
        if layers is None:
            return list(range(self.layers))
        chosen = [layer + self.layers if layer < 0 else layer for layer in layers]
        if any(not 0 <= layer < self.layers for layer in chosen):
            raise InputError(f"Layers {list(layers)} were asked for; '{self.name}' has layers 0 to {self.layers - 1}.")
        return chosen


def _from_files(
    resolved: ResolvedModel, dtype: torch.dtype | str | None, trust_remote_code: bool, lm_head: bool
) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if dtype is not None:
        kwargs["dtype"] = dtype
    if resolved.gguf_file:
        kwargs["gguf_file"] = resolved.gguf_file
    loader = AutoModelForCausalLM if lm_head else AutoModel
    try:
        with reading_weights() if resolved.gguf_file else nullcontext():
            model = loader.from_pretrained(_transformer_folder(resolved), **kwargs)
    except ImportError as error:
        raise MissingExtraError(
            f"Loading '{resolved.name}' needs a package that is not installed: {error}. "
            "For GGUF files: pip install 'polyhead[models]'."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise UnreadableModelError(f"'{resolved.name}' in {resolved.path} could not be loaded: {error}") from error
    return model.eval()


def _cut_pruned(module: nn.Module, name: str, resolved: ResolvedModel) -> None:
    """Cut the heads out again that ``polyhead.compress.save_pruned`` wrote as zeros."""
    pruned = Path(_transformer_folder(resolved)) / PRUNED_FILE
    if pruned.is_file():
        remove_heads(module, find_attention_layers(module, name), read_pruned(pruned))


def _transformer_folder(resolved: ResolvedModel) -> str:
    """The folder of the Transformer itself: sentence-transformers may keep it in a sub-folder."""
    modules = Path(resolved.path) / "modules.json"
    if modules.is_file():
        import json

        return str(Path(resolved.path) / json.loads(modules.read_text(encoding="utf-8"))[0]["path"])
    return resolved.path


def _tower_of(module: nn.Module, tower: str | None, name: str) -> nn.Module:
    towers = {
        word: part
        for word, attribute in (("text", "text_model"), ("vision", "vision_model"))
        if isinstance(part := getattr(module, attribute, None), nn.Module)
    }
    if len(towers) < 2:
        towers = {}
        if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
            inner = getattr(module, "model", module)
            towers = {word: getattr(inner, word) for word in ("encoder", "decoder") if hasattr(inner, word)}
    if tower is None:
        if "encoder" in towers:
            return towers["encoder"]
        if towers:
            raise InputError(f"'{name}' has two towers: say which with tower={' or tower='.join(map(repr, towers))}.")
        return module
    if tower not in towers:
        raise InputError(f"'{name}' has no tower {tower!r}; it has {', '.join(map(repr, towers)) or 'a single one'}.")
    return towers[tower]
