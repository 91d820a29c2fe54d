"""Actions inside attention: weights given to other tokens, scores raised, queries scaled."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from polyhead.act.base import Action
from polyhead.act.vectors import Heads, head_mask
from polyhead.errors import InputError
from polyhead.tap import AttentionCall, attention_weights

if TYPE_CHECKING:
    from polyhead.model import HeadedModel
    from polyhead.recording import Recording

__all__ = ["AttentionAction", "Run", "Span", "span_mask"]

Span = slice | tuple[int, int] | torch.Tensor


@dataclass
class Run:
    """What an attention action may know while it is on.

    Attributes:
        layers: of the model.
        mask: ``[batch, keys]`` boolean, the tokens that are no padding; None where the model was given no mask.
        states: token states that entered the layers of this pass, where the action asked for them.
        kept: whatever the action keeps between the passes of a generation.
    """

    layers: int
    mask: torch.Tensor | None = None
    states: Recording | None = None
    kept: dict[int, Any] = field(default_factory=dict)


class AttentionAction(Action):
    """Changes the attention weights of chosen heads; the outputs change by what the changed weights bring.

    Actions of this kind add up when nested: each starts from the weights the model computed.

    Args:
        heads: which heads; None for all.
    """

    needs_states = False

    def __init__(self, heads: Heads = None) -> None:
        self.heads = heads if heads is None or hasattr(heads, "shape") else list(heads)

    @abstractmethod
    def reweigh(self, layer: int, weights: torch.Tensor, run: Run) -> torch.Tensor | None:
        """New weights of one layer's chosen heads.

        Args:
            layer: its number.
            weights: ``[batch, chosen heads, tokens, keys]`` float32, rows sum to 1 (less with a sink parameter).
            run: see :class:`Run`.

        Returns:
            Weights of the same shape, or None to leave them.
        """

    def on(self, model: HeadedModel) -> AbstractContextManager[None]:
        """See :class:`Action`.

        Raises:
            UnreadableModelError: the model does not attend through transformers' attention interface.
        """
        return self._put(model)

    @contextmanager
    def _put(self, model: HeadedModel) -> Iterator[None]:
        chosen = head_mask(self.heads, model.layers, model.heads)
        layers = [layer for layer in range(model.layers) if bool(chosen[layer].any())]
        run = Run(model.layers)

        def watch(layer: int, call: AttentionCall) -> torch.Tensor | None:
            at = chosen[layer, : call.query.shape[1]].nonzero()[:, 0].to(call.query.device)
            weights = attention_weights(call).index_select(1, at).float()
            changed = self.reweigh(layer, weights, run)
            if changed is None:
                return None
            groups = call.query.shape[1] // call.value.shape[1]
            value = call.value.index_select(1, at // groups).float()
            brought = ((changed - weights) @ value).transpose(1, 2).to(call.output.dtype)
            return call.output.index_add(2, at, brought)

        with ExitStack() as stack:
            stack.enter_context(_padding(model, run))
            if self.needs_states:
                run.states = stack.enter_context(model.record("tokens"))
            stack.enter_context(model.tap_attention(watch, layers=layers))
            yield


@contextmanager
def _padding(model: HeadedModel, run: Run) -> Iterator[None]:
    """Keeps the mask that this thread's forward pass is called with."""
    thread = threading.get_ident()

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            mask = kwargs.get("attention_mask")
            run.mask = mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    handle = model.module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def span_mask(span: Span, like: torch.Tensor) -> torch.Tensor:
    """Boolean ``[batch or 1, keys]`` of a span of tokens; keys that a generation added later are outside it.

    Args:
        span: a slice, ``(first, end)``, or a boolean tensor ``[keys]`` or ``[batch, keys]``.
        like: a tensor ``[..., keys]``.

    Raises:
        InputError: a span that ends after the keys: a sliding window has dropped tokens, or it was made for other text.
    """
    keys = like.shape[-1]
    if isinstance(span, torch.Tensor):
        given = span.bool().to(like.device)
        given = given if given.dim() == 2 else given[None]
        end = given.shape[-1]
        made = torch.nn.functional.pad(given, (0, keys - end)) if end <= keys else given
    else:
        first, end = (span.start or 0, span.stop) if isinstance(span, slice) else span
        count = torch.arange(keys, device=like.device)
        made = ((count >= first) & (count < (end or 0)))[None]
    if end is None or end > keys:
        raise InputError(
            f"The span ends at token {end}, there are {keys} keys: give the span in tokens of this input, with an end; "
            "in layers with a sliding window the cache forgets tokens, so keep the input below the window."
        )
    return made
