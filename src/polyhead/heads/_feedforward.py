"""A model's feed-forward layers by role: what their memories detect (keys) and what they write (values).

As for heads, one watched run decides. Keys are the linear layers that read one state after a layer's attention (one, or
two, or a gate and keys fused in one), the value matrix is the next to run, and which of two is the gate follows from
the numbers: ``f(gate) * up`` is what entered the value matrix, for one of the known activations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polyhead.errors import UnreadableModelError
from polyhead.heads._probe import Gain, Probe, _Event, _near, _oriented, _same, gain_of
from polyhead.heads.weights import _read_through, _write_through
from polyhead.model import HeadedModel
from polyhead.structure import AttentionLayer, is_linear

__all__ = ["FeedForward", "find_feedforward", "tap_memories"]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "gelu-tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
    "quick-gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "squared-relu": lambda x: nn.functional.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


@dataclass(frozen=True)
class _Rows:
    """A linear layer's features ``first`` to ``first + count``, or all of them."""

    linear: nn.Module
    first: int
    count: int

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = _oriented(self.linear)
        rows = slice(self.first, self.first + self.count)
        return weight[rows], bias[rows]


@dataclass(frozen=True)
class FeedForward:
    """One layer's memories: ``m = f(x K^T + b)`` (gated: ``m = f(x K^T + b) * (x U^T + c)``), and it writes ``m V``.

    Attributes:
        layer: index, from 0.
        memories: how many.
        activation: ``f``; "other" where an ungated layer has one that is not known here.
        projection: the linear layer that holds the values; what enters it are the coefficients ``m``.
        call: which call of ``projection`` in one forward pass is this layer's.
    """

    layer: int
    memories: int
    activation: str
    projection: nn.Module
    call: int
    _key: _Rows
    _up: _Rows | None
    _before: Gain | None
    _after: Gain | None

    @property
    def gated(self) -> bool:
        """Whether a second projection is multiplied with the activation."""
        return self._up is not None

    def keys(self, *, fold: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``K``, ``[memories, hidden]``: what goes through the activation; ``fold`` takes the norm before into it."""
        return self._reads(self._key, fold, dtype)[0]

    def ups(self, *, fold: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        """``U``, ``[memories, hidden]``: the linear factor of a gated layer, else None."""
        return None if self._up is None else self._reads(self._up, fold, dtype)[0]

    def biases(
        self, *, fold: bool = True, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``b`` and ``c``, ``[memories]`` each; zeros where the model has none."""
        up = None if self._up is None else self._reads(self._up, fold, dtype)[1]
        return self._reads(self._key, fold, dtype)[1], up

    def values(self, *, fold: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``V``, ``[memories, hidden]``: what each memory adds to the stream, times the gain of a norm after it."""
        rows = _oriented(self.projection)[0].T.to(dtype)
        return _write_through(self._after, rows) if fold and self._after is not None else rows

    def _reads(self, part: _Rows, fold: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        rows, bias = (tensor.to(dtype) for tensor in part.read())
        if not fold or self._before is None:
            return rows, bias
        return _read_through(self._before, rows.T[None])[0].T, bias + rows @ self._before.bias.to(dtype)


def find_feedforward(model: HeadedModel) -> tuple[FeedForward, ...]:
    """The feed-forward layer of each block, in the order of computation.

    Raises:
        UnreadableModelError: a block without one, or with one of another kind (a mixture of experts).

    Example:
        >>> layer = find_feedforward(load("all-MiniLM-L6-v2"))[0]
        >>> layer.memories, layer.activation, layer.gated
        (1536, 'gelu', False)
    """
    probe = Probe.run(model)
    attention = {id(inner) for at in model.attention_layers for inner in at.module.modules()}
    attention |= {id(at.output_projection) for at in model.attention_layers}
    linear = {id(inner) for inner in model.module.modules() if is_linear(inner)} - attention
    found = []
    with torch.no_grad():
        for at in model.attention_layers:
            events = [e for e in probe.events[slice(*_span(model, at, probe))] if id(e.module) in linear]
            keys = [e for e in events if _same(e.given, events[0].given)]
            found.append(_read(model, at, probe, events[: len(keys) + 1]))
    return tuple(found)


def _span(model: HeadedModel, at: AttentionLayer, probe: Probe) -> tuple[int, int]:
    """Events after a layer's output projection and before the next layer's."""
    here = probe.index_of(at.output_projection, at.call)
    later = model.attention_layers[at.index + 1 : at.index + 2]
    there = probe.index_of(later[0].output_projection, later[0].call) if later else None
    return (here or 0) + 1, len(probe.events) if there is None else there


def _read(model: HeadedModel, at: AttentionLayer, probe: Probe, linears: list[_Event]) -> FeedForward:
    refused = UnreadableModelError(
        f"Layer {at.index} of '{model.name}' has no feed-forward layer that is known here. Expected linear layers "
        "after its attention that are keys and values (GPT-2, BERT), or keys, a gate and values (Llama, Gemma)."
    )
    if len(linears) not in (2, 3):
        raise refused
    last, width = linears[-1], linears[-1].given.shape[-1]
    parts: list[tuple[_Rows, torch.Tensor]] = []
    for event in linears[:-1]:
        if event.gave.shape[-1] % width:
            raise refused
        for first in range(0, event.gave.shape[-1], width):
            parts.append((_Rows(event.module, first, width), event.gave[..., first : first + width]))
    roles = _roles(parts, last.given)
    if roles is None:
        raise refused
    key, up, activation = roles
    before = next((e for e in probe.events if e.is_gain and _same(e.gave, linears[0].given)), None)
    after = next((e for e in probe.events if e.is_gain and _same(e.given, last.gave)), None)
    following = next((e for e in _after(probe, last) if e.is_gain and e.given.shape == last.gave.shape), None)
    if before is not None and following is not None and before.gave.shape == last.gave.shape:
        # Where the sum that follows holds the norm's output, that output is the stream itself (BERT): nothing to fold.
        before = None if _near(following.given - last.gave, before.gave) else before
    return FeedForward(
        layer=at.index,
        memories=width,
        activation=activation,
        projection=last.module,
        call=[id(e) for e in probe.events if e.module is last.module].index(id(last)),
        _key=key,
        _up=up,
        _before=_gain(probe, at, before),
        _after=_gain(probe, at, after),
    )


def _after(probe: Probe, event: _Event) -> list[_Event]:
    return probe.events[[id(e) for e in probe.events].index(id(event)) + 1 :]


def _roles(
    parts: list[tuple[_Rows, torch.Tensor]], coefficients: torch.Tensor
) -> tuple[_Rows, _Rows | None, str] | None:
    """Key, linear factor and activation that give the coefficients, or None."""
    seen = coefficients.double()
    if len(parts) == 1:
        key, gave = parts[0]
        errors = {name: float((f(gave.double()) - seen).abs().max()) for name, f in ACTIVATIONS.items()}
        best = min(errors, key=lambda name: errors[name])
        return key, None, best if _near(ACTIVATIONS[best](gave.double()), coefficients) else "other"
    if len(parts) != 2 or parts[0][1].shape != parts[1][1].shape:
        return None
    tried = []
    for (key, gate), (up, linear) in (parts, parts[::-1]):
        for name, f in ACTIVATIONS.items():
            product = f(gate.double()) * linear.double()
            if _near(product, coefficients):
                tried.append((float((product - seen).abs().max()), key, up, name))
    if not tried:
        return None
    _, key, up, name = min(tried, key=lambda one: one[0])
    return key, up, name


def _gain(probe: Probe, at: AttentionLayer, event: _Event | None) -> Gain | None:
    if event is None:
        return None
    gain = gain_of(event.module, event.given, event.gave)
    if gain is None:
        raise UnreadableModelError(
            f"A norm around the feed-forward layer {at.index} of '{probe.name}' ({type(event.module).__name__}) is "
            "neither a LayerNorm nor an RMSNorm nor a scale."
        )
    return gain


@contextmanager
def tap_memories(
    model: HeadedModel, layers: Sequence[FeedForward], callback: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Have ``callback(layer, coefficients)`` called in every forward pass of this thread while the block runs.

    Args:
        model: the model.
        layers: those to watch, of :func:`find_feedforward`.
        callback: given ``[batch, tokens, memories]`` (or ``[batch * tokens, memories]`` where the model flattens).
    """
    thread = threading.get_ident()
    counts: dict[int, int] = {}
    slots = {(id(each.projection), each.call): each.layer for each in layers}

    def restart(*_: Any) -> None:
        if threading.get_ident() == thread:
            counts.clear()

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if threading.get_ident() != thread:
            return
        call = counts.get(id(module), -1) + 1
        counts[id(module)] = call
        if (layer := slots.get((id(module), call))) is not None:
            callback(layer, args[0])

    handles = [model.module.register_forward_pre_hook(restart)]
    try:
        for projection in {id(each.projection): each.projection for each in layers}.values():
            handles.append(projection.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
