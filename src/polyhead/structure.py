"""Find a model's attention heads by structure and by a probe run: no list of model classes, no trust in names.

A tiny input is sent through the model once. What enters an output projection is what "head output" means here, so
the probe looks for output projections:

* where the model attends through transformers' attention interface, it is the first linear layer that runs after the
  attention call and takes ``heads * value_dim`` features;
* elsewhere, it is the first linear layer that runs after the query, key and value projections of a module that has
  them (or one fused projection), and takes as many features as the values have.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from polyhead.errors import UnreadableModelError
from polyhead.tap import AttentionCall, tapped

__all__ = ["AttentionLayer", "find_attention_layers", "is_linear", "probe_inputs"]

_SEPARATE = re.compile(r"^(q|k|v|query|key|value|[qkv]_?proj|[qkv]_lin|(query|key|value)_(proj|layer)|in_proj_[qkv])$")
_FUSED = re.compile(r"^(qkv|qkv_proj|query_key_value|Wqkv|c_attn|in_proj|att_proj|W_pack|kv|kv_proj)$")
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head", "nhead")
_KV_HEAD_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


@dataclass(frozen=True)
class AttentionLayer:
    """One layer's self-attention.

    Attributes:
        index: position in the order of computation, from 0.
        path: dotted name of the attention module in the model.
        module: the attention module.
        heads, kv_heads: query heads, and the key-value heads they share.
        head_dim: features of one head's output.
        output_projection: the linear layer that mixes the heads; what enters it is the head output.
        call: which call of ``output_projection`` in one forward pass is this layer's (models may share weights).
        sliding_window: tokens a query can see, or None where it sees all.
        uses_interface: whether it attends through transformers' attention interface.
    """

    index: int
    path: str
    module: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    output_projection: nn.Module
    call: int
    sliding_window: int | None
    uses_interface: bool


@dataclass
class _Found:
    module: nn.Module
    heads: int
    kv_heads: int
    head_dim: int
    uses_interface: bool
    sliding_window: int | None = None
    width: int = field(default=0)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: ``nn.Linear``, a quantised one, or GPT-2's transposed ``Conv1D``."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or isinstance(module, nn.Embedding):
        return False
    return hasattr(module, "in_features") or hasattr(module, "nf")


def find_attention_layers(root: nn.Module, name: str) -> tuple[AttentionLayer, ...]:
    """Probe ``root`` and return its attention layers in the order of computation.

    Raises:
        UnreadableModelError: the probe did not run, or no attention with an output projection was found.
    """
    paths = {id(module): path for path, module in root.named_modules()}
    events = _Events(root)
    with events, tapped(root, events.on_attention):
        _run_probe(root, name)
    layers: list[AttentionLayer] = []
    calls: dict[int, int] = {}
    waiting: _Found | None = None
    for event in events.log:
        if isinstance(event, _Found):
            waiting = event
            continue
        projection, width = event
        calls[id(projection)] = calls.get(id(projection), -1) + 1
        if waiting is not None and width == waiting.width and width == waiting.heads * waiting.head_dim:
            layers.append(
                AttentionLayer(
                    index=len(layers),
                    path=paths.get(id(waiting.module), type(waiting.module).__name__),
                    module=waiting.module,
                    heads=waiting.heads,
                    kv_heads=waiting.kv_heads,
                    head_dim=waiting.head_dim,
                    output_projection=projection,
                    call=calls[id(projection)],
                    sliding_window=waiting.sliding_window,
                    uses_interface=waiting.uses_interface,
                )
            )
            waiting = None
    if not layers:
        raise UnreadableModelError(
            f"No attention heads found in '{name}' ({type(root).__name__}). Looked for modules that attend through "
            f"transformers' attention interface (called {events.attention_calls} times in a probe), and for modules "
            f"with query, key and value projections followed by an output projection (found {events.fallback_calls}). "
            "Give a Transformer with softmax attention, or the sub-module that holds it."
        )
    return tuple(layers)


class _Events:
    """What happens in a probe run, in order: attention calls, and linear layers with the width they take."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.log: list[Any] = []
        self.attention_calls = 0
        self.fallback_calls = 0
        self._owners = _projection_owners(root)
        self._handles: list[Any] = []

    def __enter__(self) -> _Events:
        for module in self.root.modules():
            if is_linear(module):
                self._handles.append(module.register_forward_pre_hook(self._on_linear))
                self._handles.append(module.register_forward_hook(self._after_linear))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def on_attention(self, call: AttentionCall) -> None:
        self.attention_calls += 1
        heads, head_dim = call.output.shape[2], call.output.shape[3]
        window = call.kwargs.get("sliding_window") or getattr(call.module, "sliding_window", None)
        found = _Found(call.module, heads, call.key.shape[1], head_dim, True, window if window else None)
        found.width = heads * head_dim
        # An interface call is certain; what the projections before it suggested is not.
        while self.log and isinstance(self.log[-1], _Found) and not self.log[-1].uses_interface:
            self.log.pop()
        self.log.append(found)

    def _on_linear(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], torch.Tensor) and id(module) not in self._owners:
            self.log.append((module, args[0].shape[-1]))

    def _after_linear(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        owner = self._owners.get(id(module))
        if owner is None or not isinstance(output, torch.Tensor):
            return
        attention, width = owner
        heads = _count(attention, _HEAD_COUNTS)
        if not heads or width % heads:
            return
        self.fallback_calls += 1
        head_dim = width // heads
        kv_heads = _count(attention, _KV_HEAD_COUNTS) or heads
        found = _Found(attention, heads, min(kv_heads, heads), head_dim, False)
        found.width = width
        if self.log and isinstance(self.log[-1], _Found) and not self.log[-1].uses_interface:
            self.log[-1] = found
        else:
            self.log.append(found)


def _projection_owners(root: nn.Module) -> dict[int, tuple[nn.Module, int]]:
    """For each query, key, value or fused projection: the attention module it belongs to and the width of its heads."""
    owners: dict[int, tuple[nn.Module, int]] = {}
    for module in root.modules():
        linear = {name: child for name, child in module.named_children() if is_linear(child)}
        separate = [child for name, child in linear.items() if _SEPARATE.match(name)]
        fused = [child for name, child in linear.items() if _FUSED.match(name)]
        query = next(
            (child for name, child in linear.items() if _SEPARATE.match(name) and name.startswith(("q", "in_proj_q"))),
            None,
        )
        if len(separate) >= 3 and query is not None:
            width = _out_features(query)
        elif fused and (not separate or query is not None):
            width = _out_features(query) if query is not None else _in_features(fused[0])
        else:
            continue
        for child in separate + fused:
            owners[id(child)] = (module, width)
    return owners


def _in_features(module: nn.Module) -> int:
    given: int | None = getattr(module, "in_features", None)
    return int(given) if given is not None else int(_weight(module).shape[0])  # Conv1D keeps [in, out]


def _out_features(module: nn.Module) -> int:
    given: int | None = getattr(module, "out_features", None)
    return int(given) if given is not None else int(_weight(module).shape[1])


def _weight(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def _count(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _run_probe(root: nn.Module, name: str) -> None:
    training = root.training
    root.eval()
    try:
        with torch.no_grad():
            root(**probe_inputs(root))
    except Exception as error:
        raise UnreadableModelError(
            f"A probe run through '{name}' ({type(root).__name__}) failed: {type(error).__name__}: {error}. Expected a "
            f"model that takes {sorted(probe_inputs(root))}; give the encoder or tower that does."
        ) from error
    finally:
        root.train(training)


def probe_inputs(root: nn.Module) -> dict[str, torch.Tensor]:
    """A smallest valid input for a model, by its main input's name: token ids, an image or a log-mel spectrogram."""
    parameter = next(root.parameters())
    config = getattr(root, "config", None)
    main = getattr(root, "main_input_name", "input_ids")
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        if isinstance(size, dict):
            size = (size["height"], size["width"])
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", 3)
        return {main: torch.zeros(1, channels, height, width, device=parameter.device, dtype=parameter.dtype)}
    if main == "input_features":
        bins, frames = getattr(config, "num_mel_bins", 80), 2 * getattr(config, "max_source_positions", 1500)
        features = torch.zeros(1, bins, frames, device=parameter.device, dtype=parameter.dtype)
        return {main: features, **_decoder_probe(root, parameter.device)}
    vocabulary = getattr(config, "vocab_size", None) or 8
    # The end token last: CLIP's text tower pools at it, and fails on a text without.
    end = getattr(config, "eos_token_id", None)
    tokens = [(3 + i) % vocabulary for i in range(4)]
    if isinstance(end, int) and 0 <= end < vocabulary:
        tokens[-1] = end
    return {"input_ids": torch.tensor([tokens], device=parameter.device), **_decoder_probe(root, parameter.device)}


def _decoder_probe(root: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
    """What the decoder of a whole encoder-decoder is given: fewer tokens than the encoder, so cross-attention shows."""
    if "decoder_input_ids" not in inspect.signature(root.forward).parameters:
        return {}
    return {"decoder_input_ids": torch.tensor([[3, 4, 5]], device=device)}
