"""What a forward pass gave: head outputs, token states and attention weights, and the hooks that catch them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyhead.errors import InputError, UnreadableModelError
from polyhead.structure import AttentionLayer
from polyhead.tap import AttentionCall, attention_weights, tapped

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Recording", "attention_hooks", "attention_taps", "blocks_of", "token_hooks"]


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
def attention_hooks(model: HeadedModel, recording: Recording, chosen: set[int]) -> Iterator[None]:
    """Attention weights: from the interface's calls, else from the softmax that an attention module itself runs."""
    thread = threading.get_ident()
    own_softmax = [layer for layer in model.attention_layers if not layer.uses_interface]
    with ExitStack() as stack:
        next_layer = stack.enter_context(_layer_counter(model, chosen))

        def on_call(call: AttentionCall) -> None:
            layer = next_layer(call.module)
            if layer is not None:
                recording._attention[layer.index] = attention_weights(call)

        stack.enter_context(tapped(model.module, on_call, interface=not own_softmax))
        for module in {id(layer.module): layer.module for layer in own_softmax}.values():
            stack.enter_context(_softmax_of(module, next_layer, recording, thread))
        yield


@contextmanager
def attention_taps(
    model: HeadedModel,
    watch: Callable[[int, AttentionCall], torch.Tensor | None] | None,
    prepare: Callable[[int, AttentionCall], AttentionCall | None] | None,
    chosen: set[int],
) -> Iterator[None]:
    """The tap with layer numbers, for models that attend through the interface; see HeadedModel.tap_attention."""
    outside = [layer.path for layer in model.attention_layers if layer.index in chosen and not layer.uses_interface]
    if outside:
        raise UnreadableModelError(
            f"Attention inside '{model.name}' cannot be watched or changed: {outside[0]} does not attend through "
            "transformers' attention interface. Its head outputs can (tap_heads, record), and its weights be recorded."
        )
    with ExitStack() as stack:
        before = stack.enter_context(_layer_counter(model, chosen))
        after = stack.enter_context(_layer_counter(model, chosen))

        def on_call(call: AttentionCall) -> torch.Tensor | None:
            layer = after(call.module)
            return None if layer is None or watch is None else watch(layer.index, call)

        def ahead(call: AttentionCall) -> AttentionCall | None:
            layer = before(call.module)
            return None if layer is None or prepare is None else prepare(layer.index, call)

        stack.enter_context(tapped(model.module, on_call, prepare=ahead))
        yield


@contextmanager
def _layer_counter(model: HeadedModel, chosen: set[int]) -> Iterator[Callable[[nn.Module], AttentionLayer | None]]:
    """Which layer a call of an attention module is: layers may share one module, and then calls are counted."""
    order: dict[int, list[AttentionLayer]] = {}
    for layer in model.attention_layers:
        order.setdefault(id(layer.module), []).append(layer)
    counts: dict[int, int] = {}
    thread = threading.get_ident()

    def next_layer(module: nn.Module) -> AttentionLayer | None:
        slots = order.get(id(module))
        if slots is None:
            return None
        # Anew after the last one too: who calls the model's `forward` itself goes past the hook that restarts.
        call = (counts.get(id(module), -1) + 1) % len(slots)
        counts[id(module)] = call
        return slots[call] if slots[call].index in chosen else None

    def restart(*_: Any) -> None:
        if threading.get_ident() == thread:
            counts.clear()

    handle = model.module.register_forward_pre_hook(restart)
    try:
        yield next_layer
    finally:
        handle.remove()


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
def token_hooks(model: HeadedModel, recording: Recording) -> Iterator[None]:
    """Token states at the borders of the blocks, found as the members of the list of layers around the attention."""
    blocks = blocks_of(model)
    thread = threading.get_ident()
    position = {"next": 0}

    def restart(*_: Any) -> None:
        if threading.get_ident() == thread:
            position["next"] = 0

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            states = args[0] if args else kwargs["hidden_states"]
            position["next"] %= len(blocks)
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


def blocks_of(model: HeadedModel) -> list[nn.Module]:
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
