"""Take a signal out of what one layer's attention is given."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from polyhead.act.base import Action
from polyhead.errors import InputError
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["RemoveSignal"]


@paper("sparse-attention-decomposition")
class RemoveSignal(Action):
    """Subtract a vector from what a layer's query, key and value projections are given at one token.

    With ``trace.signal(side)`` of :func:`polyhead.heads.trace.upstream` the kept terms of the traced logit read nothing
    any more, on that side; the rest of the residual stream goes on as it was.

    Args:
        signal: ``[hidden]``.
        layer: whose attention.
        position: which token; negative ones count from the last.
        row: of the batch; None for all.

    Example:
        >>> import polyhead, torch
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> with RemoveSignal(torch.randn(384), layer=2, position=3).on(model), torch.no_grad():
        ...     _ = model(**model.tokenize(["no signal here"]))
    """

    name: ClassVar[str] = "remove-signal"
    summary: ClassVar[str] = "subtract a vector from what one layer's attention is given at one token"

    def __init__(self, signal: torch.Tensor, layer: int, position: int, row: int | None = None) -> None:
        if signal.dim() != 1:
            raise InputError(f"The signal has the shape {list(signal.shape)}, expected [hidden].")
        self.signal, self.layer, self.position, self.row = signal, layer, position, row

    @contextmanager
    def on(self, model: HeadedModel) -> Iterator[None]:
        """See :class:`Action`.

        Raises:
            InputError: a layer, or a width, that the model does not have; layers that share one attention module.
        """
        if not 0 <= self.layer < model.layers or self.signal.shape[0] != model.hidden_size:
            raise InputError(
                f"A signal of width {self.signal.shape[0]} for layer {self.layer} was given; '{model.name}' has "
                f"{model.layers} layers of width {model.hidden_size}."
            )
        module = model.attention_layers[self.layer].module
        if sum(at.module is module for at in model.attention_layers) > 1:
            raise InputError(f"Layers of '{model.name}' share one attention module: a signal of one can't be removed.")
        thread, rows = threading.get_ident(), slice(None) if self.row is None else self.row

        def before(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if threading.get_ident() != thread:
                return None
            x = args[0] if args else kwargs["hidden_states"]
            at = torch.zeros(x.shape[:2], dtype=x.dtype, device=x.device)
            at[rows, self.position] = 1
            changed = x - at[..., None] * self.signal.to(x)
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
