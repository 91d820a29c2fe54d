"""The tap: one attention function registered with transformers that watches attention, and changes it when asked.

It is registered with ``AttentionInterface`` and with ``AttentionMaskInterface`` (without the second, transformers
passes no mask at all and padded rows go wrong in silence), and hands the work to the kernel the model used before.
A model is switched to it for the time of a ``with`` block only.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

__all__ = ["AttentionCall", "additive_mask", "attention_weights", "tapped"]

# Not "polyhead_sdpa": transformers runs support checks on names that contain "sdpa", "flash" or "flex".
_TAP, _TAP_ADDITIVE = "polyhead", "polyhead_additive"
_EAGER = "eager"


@dataclass
class AttentionCall:
    """One call of an attention module, seen from inside: position and key normalisation have already happened.

    Attributes:
        module: the attention module.
        query: ``[batch, heads, tokens, head_dim]``.
        key, value: ``[batch, kv_heads, keys, head_dim]``.
        mask: boolean ``[batch, 1, tokens, keys]`` (True where allowed), additive of the same shape, or None.
        kwargs: scaling, dropout, sliding_window, softcap, sinks and so on, as the model passed them.
        output: ``[batch, tokens, heads, value_dim]``, per-head outputs; empty before the kernel has run.
    """

    module: nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    kwargs: dict[str, Any]
    output: torch.Tensor


Watcher = Callable[[AttentionCall], "torch.Tensor | None"]
Preparer = Callable[[AttentionCall], "AttentionCall | None"]


class _Watchers(threading.local):
    """Watchers of this thread: two threads may watch one model at once, each its own forward passes."""

    def __init__(self) -> None:
        self.stack: list[tuple[Watcher, Preparer | None]] = []


_watchers = _Watchers()
_lock = threading.RLock()
_users: dict[int, int] = {}
_originals: dict[int, str] = {}


def _tap(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    original = _originals.get(id(getattr(module, "config", None)), "sdpa")
    eager = _eager_of(module)
    name = original if original.startswith("polyhead_") else "sdpa"
    kernel = eager if original == _EAGER and eager else ALL_ATTENTION_FUNCTIONS[name]
    call = AttentionCall(module, query, key, value, attention_mask, kwargs, query[:0])
    for _, prepare in _watchers.stack:
        if prepare is not None:
            call = prepare(call) or call
    output, weights = kernel(module, call.query, call.key, call.value, call.mask, **call.kwargs)
    for watch, _ in _watchers.stack:
        changed = watch(replace(call, output=output))
        output = output if changed is None else changed
    return output, weights


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

    for name, mask in ((_TAP, sdpa_mask), (_TAP_ADDITIVE, eager_mask)):
        AttentionInterface.register(name, _tap)
        AttentionMaskInterface.register(name, mask)


@contextmanager
def tapped(
    module: nn.Module, watch: Watcher, *, prepare: Preparer | None = None, interface: bool = True
) -> Iterator[None]:
    """Have ``watch`` called for every attention call of ``module`` in this thread while the block runs.

    A tensor that ``watch`` returns takes the place of the call's output. ``prepare`` is called before the kernel, in
    the order of entering, and may return another call (queries, keys, values, mask or kwargs changed) to compute.

    Kernels other than eager and our own run as SDPA meanwhile, which gives the same numbers. ``interface=False`` is for
    a model that attends without transformers' attention interface: nothing is called, and it runs its own eager
    attention, since some such models (Falcon) choose their mask by the name of the kernel and do not know ours.
    """
    _register()
    configs = _configs(module)
    with _lock:
        for config in configs:
            if _users.get(id(config), 0) == 0:
                original = config._attn_implementation or "sdpa"
                _originals[id(config)] = original
                tap = _TAP_ADDITIVE if original == _EAGER else _TAP
                _set(config, tap if interface else _EAGER)
            _users[id(config)] = _users.get(id(config), 0) + 1
    entry = (watch, prepare)
    _watchers.stack.append(entry)
    try:
        yield
    finally:
        _watchers.stack.remove(entry)
        with _lock:
            for config in configs:
                _users[id(config)] -= 1
                if _users[id(config)] == 0:
                    _set(config, _originals.pop(id(config)))
                    del _users[id(config)]


def _configs(module: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            found[id(config)] = config
    return list(found.values())


def _set(config: Any, name: str) -> None:
    # The public setter would spread the name to sub-configs, each of which may have a kernel of its own.
    config._attn_implementation_internal = name


def _eager_of(module: nn.Module) -> Callable[..., Any] | None:
    """The model file's own eager attention, which alone knows its sinks, soft caps and position biases."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    return None


def attention_weights(call: AttentionCall) -> torch.Tensor:
    """Attention weights ``[batch, heads, tokens, keys]`` of one call, by the model file's own eager attention.

    Memory grows with ``tokens * keys`` for this one layer; the model's own pass keeps its kernel.
    """
    mask = additive_mask(call)
    kwargs = {**call.kwargs, "dropout": 0.0}
    eager = _eager_of(call.module)
    if eager is not None:
        _, weights = eager(call.module, call.query, call.key, call.value, mask, **kwargs)
        if weights is not None:
            return weights
    groups = call.query.shape[1] // call.key.shape[1]
    key = call.key.repeat_interleave(groups, dim=1)
    scaling = kwargs.get("scaling") or call.query.shape[-1] ** -0.5
    scores = call.query @ key.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(call.query.dtype)


def additive_mask(call: AttentionCall) -> torch.Tensor | None:
    """The call's mask as an additive one ``[batch or 1, 1, tokens, keys]``, or None where every token sees every other.

    SDPA masks are boolean, or absent where causality alone would do.
    """
    mask, query = call.mask, call.query
    lowest = torch.finfo(query.dtype).min
    if mask is None:
        causal = call.kwargs.get("is_causal")
        if causal is None:
            causal = getattr(call.module, "is_causal", False)
        tokens, keys = query.shape[2], call.key.shape[2]
        if not causal or tokens == 1:
            return None
        allowed = torch.ones(tokens, keys, dtype=torch.bool, device=query.device).tril(keys - tokens)
        mask = allowed[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
