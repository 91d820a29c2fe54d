"""A model with its heads: load any Hugging Face Transformer, and record what each head gives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polyhead.errors import InputError, MissingExtraError, UnreadableModelError
from polyhead.hub import ResolvedModel, resolve
from polyhead.structure import AttentionLayer, find_attention_layers
from polyhead.tap import AttentionCall, attention_weights, tapped

__all__ = ["AttentionLayer", "HeadedModel", "Recording", "load"]

RECORDABLE = ("heads", "tokens", "attention")
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
        torch.Size([1, 6, 12, 9, 32])
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
    return HeadedModel(_tower_of(module, tower, name), name=name, files=resolved, trust_remote_code=trust_remote_code)


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
        try:
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=self._trust_remote_code, **({"gguf_file": gguf} if gguf else {})
            )
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
        weight = projection.weight  # Conv1D keeps [in, out], Linear [out, in].
        matrix = weight if hasattr(projection, "nf") else weight.T
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

        def restart(*_: Any) -> None:
            if threading.get_ident() == thread:
                counts.clear()

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if threading.get_ident() != thread:
                return None
            call = counts.get(id(module), -1) + 1
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
                stack.enter_context(_token_hooks(self, recording))
            if "attention" in what:
                stack.enter_context(_attention_hooks(self, recording, set(chosen)))
            yield recording

    def _chosen(self, layers: Sequence[int] | None) -> list[int]:
        if layers is None:
            return list(range(self.layers))
        chosen = [layer + self.layers if layer < 0 else layer for layer in layers]
        if any(not 0 <= layer < self.layers for layer in chosen):
            raise InputError(f"Layers {list(layers)} were asked for; '{self.name}' has layers 0 to {self.layers - 1}.")
        return chosen


class Recording:
    """What one forward pass gave. Each is there when it was asked for; tensors stay in the autograd graph."""

    def __init__(self, what: Sequence[str], layers: Sequence[int]) -> None:
        self.what = tuple(what)
        self.layers = list(layers)
        self._heads: dict[int, torch.Tensor] = {}
        self._attention: dict[int, torch.Tensor] = {}
        self._tokens: dict[int, torch.Tensor] = {}

    @property
    def heads(self) -> torch.Tensor:
        """Head outputs before the output projection, ``[batch, layers, heads, tokens, head_dim]``."""
        return self._stacked(self._heads, "heads", self.layers)

    @property
    def attention(self) -> torch.Tensor:
        """Attention weights ``[batch, layers, heads, queries, keys]``; each row sums to 1 (less with a sink)."""
        return self._stacked(self._attention, "attention", self.layers)

    @property
    def tokens(self) -> torch.Tensor:
        """Token states ``[batch, layers + 1, tokens, hidden]``: what enters each layer, and what leaves the last one.

        The last entry is before a final norm, where the model has one after its layers.
        """
        return self._stacked(self._tokens, "tokens", sorted(self._tokens))

    def layer_heads(self, layer: int) -> torch.Tensor:
        """Head outputs of one layer, ``[batch, heads, tokens, head_dim]``; for models whose layers differ in shape."""
        return self._one(self._heads, "heads", layer)

    def layer_attention(self, layer: int) -> torch.Tensor:
        """Attention weights of one layer, ``[batch, heads, queries, keys]``."""
        return self._one(self._attention, "attention", layer)

    def _add_heads(self, layer: int, z: torch.Tensor) -> None:
        self._heads[layer] = z.movedim(-2, 1) if z.dim() == 4 else z.movedim(-2, 0).unsqueeze(0)

    def _one(self, found: dict[int, torch.Tensor], kind: str, layer: int) -> torch.Tensor:
        if layer not in found:
            raise InputError(
                f"No {kind} of layer {layer} recorded. Recorded: {', '.join(self.what)} of layers {self.layers}, from "
                "the forward passes run inside the with block."
            )
        return found[layer]

    def _stacked(self, found: dict[int, torch.Tensor], kind: str, order: Sequence[int]) -> torch.Tensor:
        tensors = [self._one(found, kind, layer) for layer in order] if found else [self._one(found, kind, 0)]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise InputError(
                f"The layers' {kind} have different shapes {sorted(shapes)} and cannot be stacked; "
                f"take them one by one with layer_{kind}(layer)."
            )
        return torch.stack(tensors, dim=1)


@contextmanager
def _attention_hooks(model: HeadedModel, recording: Recording, chosen: set[int]) -> Iterator[None]:
    """Attention weights: from the interface's calls, else from the softmax that an attention module itself runs."""
    order: dict[int, list[AttentionLayer]] = {}
    for layer in model.attention_layers:
        order.setdefault(id(layer.module), []).append(layer)
    counts: dict[int, int] = {}
    thread = threading.get_ident()

    def next_layer(module: nn.Module) -> AttentionLayer | None:
        slots = order.get(id(module))
        if slots is None:
            return None
        call = counts.get(id(module), -1) + 1
        counts[id(module)] = call
        return slots[call] if call < len(slots) and slots[call].index in chosen else None

    def on_call(call: AttentionCall) -> None:
        layer = next_layer(call.module)
        if layer is not None:
            recording._attention[layer.index] = attention_weights(call)

    def restart(*_: Any) -> None:
        if threading.get_ident() == thread:
            counts.clear()

    own_softmax = [layer for layer in model.attention_layers if not layer.uses_interface]
    with ExitStack() as stack:
        stack.callback(model.module.register_forward_pre_hook(restart).remove)
        stack.enter_context(tapped(model.module, on_call, interface=not own_softmax))
        for module in {id(layer.module): layer.module for layer in own_softmax}.values():
            stack.enter_context(_softmax_of(module, next_layer, recording, thread))
        yield


class _SoftmaxWatch(torch.overrides.TorchFunctionMode):
    """Keeps the last four-dimensional softmax computed while it is active: an eager attention module's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "softmax" and isinstance(result, torch.Tensor) and result.dim() == 4:
            self.weights = result
        return result


@contextmanager
def _softmax_of(
    module: nn.Module,
    next_layer: Callable[[nn.Module], AttentionLayer | None],
    recording: Recording,
    thread: int,
) -> Iterator[None]:
    active: list[_SoftmaxWatch] = []

    def before(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == thread:
            watch = _SoftmaxWatch()
            watch.__enter__()
            active.append(watch)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != thread or not active:
            return
        watch = active.pop()
        watch.__exit__(None, None, None)
        layer = next_layer(module)
        if layer is not None and watch.weights is not None:
            recording._attention[layer.index] = watch.weights

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _token_hooks(model: HeadedModel, recording: Recording) -> Iterator[None]:
    """Token states at the borders of the blocks, found as the members of the list of layers around the attention."""
    blocks = _blocks_of(model)
    thread = threading.get_ident()
    position = {"next": 0}

    def restart(*_: Any) -> None:
        if threading.get_ident() == thread:
            position["next"] = 0

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            states = args[0] if args else kwargs["hidden_states"]
            recording._tokens[position["next"]] = states

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread:
            position["next"] += 1
            recording._tokens[position["next"]] = output if isinstance(output, torch.Tensor) else output[0]

    handles = [model.module.register_forward_pre_hook(restart)]
    try:
        for block in {id(block): block for block in blocks}.values():
            handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(block.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _blocks_of(model: HeadedModel) -> list[nn.Module]:
    """The module around each attention layer that stands directly in a list of modules: the Transformer block."""
    lists = {id(child): child for child in model.module.modules() if isinstance(child, nn.ModuleList)}
    blocks = []
    for layer in model.attention_layers:
        around = [
            member
            for container in lists.values()
            for member in container
            if any(inner is layer.module for inner in member.modules())
        ]
        if not around:
            raise UnreadableModelError(
                f"Token states of '{model.name}' cannot be recorded: no nn.ModuleList holds the block around "
                f"'{layer.path}'. Record 'heads' and 'attention' instead."
            )
        blocks.append(min(around, key=lambda member: sum(1 for _ in member.modules())))
    return blocks


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
        model = loader.from_pretrained(_transformer_folder(resolved), **kwargs)
    except ImportError as error:
        raise MissingExtraError(
            f"Loading '{resolved.name}' needs a package that is not installed: {error}. "
            "For GGUF files: pip install 'polyhead[models]'."
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise UnreadableModelError(f"'{resolved.name}' in {resolved.path} could not be loaded: {error}") from error
    return model.eval()


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
