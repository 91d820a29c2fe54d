"""Start a forward pass in the middle: run a model once, keep what its blocks gave, and hand it on in later runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from polyhead.errors import UnreadableModelError
from polyhead.heads.tasks import Batch
from polyhead.recording import blocks_of

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["BlockStates", "block_states", "without_cache"]

_TOLERANCE = 1e-4  # of the largest state; bf16 gets its own


def without_cache(model: HeadedModel, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The inputs, and for a decoder the wish for no cache: it would copy keys and values that nobody reads."""
    keeps = getattr(model.config, "use_cache", False) and not getattr(model.config, "is_encoder_decoder", False)
    return {"use_cache": False, **inputs} if keeps and hasattr(model.module, "generate") else dict(inputs)


@dataclass
class BlockStates:
    """What each block and each attention module of a model gave for one batch.

    Attributes:
        model: that was run.
        blocks: one a layer, all different.
        rows: of the batch.
        given: what each block returned.
        raw: what each layer's output projection was given, before any hook on it.
        attended: what each layer's attention module returned; None where it cannot be put in its place.
    """

    model: HeadedModel
    blocks: list[nn.Module]
    rows: int
    given: list[Any] = field(default_factory=list)
    raw: list[torch.Tensor] = field(default_factory=list)
    attended: list[Any] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Token states in the batch, padding included."""
        return int(states_of(self.given[0])[..., 0].numel())

    @contextmanager
    def resumed_at(self, layer: int, copies: int) -> Iterator[None]:
        """Forward passes of this thread on the batch ``copies`` times over begin at a layer's output projection.

        The blocks below hand on what the last of them gave; the layer's attention module hands on what it gave.
        """
        with ExitStack() as stack:
            if layer > 0:
                given = self._repeated(self.given[layer - 1], copies)
                for block in self.blocks[:layer]:
                    stack.enter_context(_instead(block, lambda: given))
            if self.attended[layer] is not None:
                at = self.model.attention_layers[layer]
                raw, whole = self._repeated(self.raw[layer], copies), self.attended[layer]
                rest = self._repeated(whole[1:], copies) if isinstance(whole, tuple) else None
                inside = _holds(at.module, at.output_projection)

                def attend() -> Any:
                    first = at.output_projection(raw) if inside else raw
                    return first if rest is None else (first, *rest)

                stack.enter_context(_instead(at.module, attend))
            yield

    def _repeated(self, given: Any, copies: int) -> Any:
        if isinstance(given, torch.Tensor):
            whole = given.dim() > 0 and given.shape[0] == self.rows
            return given.repeat(copies, *[1] * (given.dim() - 1)) if whole else given
        if isinstance(given, tuple):
            return tuple(self._repeated(part, copies) for part in given)
        return given


@contextmanager
def _instead(module: nn.Module, give: Callable[[], Any]) -> Iterator[None]:
    """Calls of a module from this thread return what ``give`` gives; its hooks run as ever."""
    thread, forward, kept = threading.get_ident(), module.forward, module.__dict__.get("forward")

    def handed_on(*args: Any, **kwargs: Any) -> Any:
        return give() if threading.get_ident() == thread else forward(*args, **kwargs)

    module.__dict__["forward"] = handed_on
    try:
        yield
    finally:
        if kept is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = kept


def block_states(model: HeadedModel, batch: Batch) -> BlockStates | None:
    """One run of the model with what its blocks gave kept; None where later runs cannot begin in the middle.

    That is where no list of blocks is found, one block serves several layers (ALBERT), something happens between
    blocks (T5), or a resumed run does not give what the whole run gave.
    """
    try:
        blocks = blocks_of(model)
    except UnreadableModelError:
        return None
    if len({id(block) for block in blocks}) < len(blocks):
        return None
    watch = _Watch(model, blocks)
    with watch:
        model(**without_cache(model, batch.inputs))
    rows = next(iter(batch.inputs.values())).shape[0]
    chained = watch.order == list(range(len(blocks))) and all(
        states_of(watch.given[index]) is watch.entered[index + 1] for index in range(len(blocks) - 1)
    )
    if not chained or any(states_of(given).shape[0] != rows for given in watch.given):
        return None
    found = BlockStates(model, blocks, rows, watch.given, [watch.raw[i] for i in range(model.layers)])
    found.attended = [_replaceable(model, layer, watch) for layer in range(model.layers)]
    return found if _resumes(model, batch, found) else None


def states_of(output: Any) -> Any:
    """Token states in what a block returned."""
    return output[0] if isinstance(output, tuple) else output


class _Watch:
    """Keeps what goes in and out of blocks, attention modules and output projections in one run of this thread."""

    def __init__(self, model: HeadedModel, blocks: list[nn.Module]) -> None:
        self.model, self.blocks = model, blocks
        self.thread = threading.get_ident()
        self.order: list[int] = []
        self.entered: list[Any] = []
        self.given: list[Any] = []
        self.raw: dict[int, torch.Tensor] = {}
        self.projected: dict[int, torch.Tensor] = {}
        self.attended: dict[int, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> None:
        for index, (block, at) in enumerate(zip(self.blocks, self.model.attention_layers, strict=True)):
            hooks = [
                block.register_forward_hook(self._after_block(index), with_kwargs=True),
                at.output_projection.register_forward_pre_hook(self._keep_raw(index), prepend=True),
                at.output_projection.register_forward_hook(self._keep(self.projected, index)),
                at.module.register_forward_hook(self._keep(self.attended, index)),
            ]
            for hook in hooks:
                self._stack.callback(hook.remove)

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _after_block(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if threading.get_ident() == self.thread:
                self.order.append(index)
                self.entered.append(args[0] if args else kwargs.get("hidden_states"))
                self.given.append(output)

        return hook

    def _keep_raw(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if threading.get_ident() == self.thread:
                self.raw[index] = args[0]

        return hook

    def _keep(self, into: dict[int, Any], index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == self.thread:
                into[index] = output

        return hook


def _holds(module: nn.Module, part: nn.Module) -> bool:
    return any(inner is part for inner in module.modules())


def _replaceable(model: HeadedModel, layer: int, watch: _Watch) -> Any:
    """What an attention module returned, if it is made of the output projection's input or output alone, else None."""
    at, output = model.attention_layers[layer], watch.attended.get(layer)
    first = states_of(output)
    source = watch.projected[layer] if _holds(at.module, at.output_projection) else watch.raw[layer]
    return output if isinstance(first, torch.Tensor) and torch.equal(first, source) else None


def _resumes(model: HeadedModel, batch: Batch, states: BlockStates) -> bool:
    """Whether a run resumed at the last layer gives what the whole run gave: models may reach back further."""
    last: list[torch.Tensor] = []
    handle = states.blocks[-1].register_forward_hook(lambda module, args, output: last.append(states_of(output)))
    try:
        with states.resumed_at(model.layers - 1, 1):
            model(**without_cache(model, batch.inputs))
    finally:
        handle.remove()
    expected = states_of(states.given[-1])
    tolerance = max(_TOLERANCE, 2 * torch.finfo(expected.dtype).eps) * float(expected.abs().max())
    return bool(torch.allclose(last[0], expected, rtol=0, atol=tolerance))
