"""Tuning a few heads: gradients of all other heads' weights are set to zero, whatever the optimiser (alps)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from polyhead.act.vectors import Heads, head_mask
from polyhead.errors import InputError
from polyhead.heads._probe import Probe, _cuts, _linear_children, projections_of
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel
    from polyhead.structure import AttentionLayer

__all__ = ["HeadGradMask"]


@paper("alps")
class HeadGradMask:
    """Lets the gradients of chosen heads' query, key, value and output weights through, and no others of attention.

    Of the projections' weights and biases the slices of other heads get gradient 0; so does the bias of the output
    projection, which belongs to no head. A key-value head is let through where one of its query heads is chosen.
    Feed-forward layers, norms and embeddings are left alone: freeze them with ``requires_grad_(False)``. The forward
    pass is not changed. Weight decay moves weights without a gradient too: set it to 0.

    Args:
        heads: what is tuned, such as ``WeightShift().score(base, tuned).top(0.1)``.

    Example:
        >>> import torch
        >>> from polyhead import load
        >>> model = load("all-MiniLM-L6-v2")
        >>> with HeadGradMask([(5, 3)]).on(model):
        ...     model(**model.tokenize(["one text"])).last_hidden_state[:, 0, 0].sum().backward()
        >>> rows = model.attention_layers[5].module.value.weight.grad.abs().sum(1).nonzero()[:, 0]
        >>> int(rows[0]), int(rows[-1])
        (96, 127)
    """

    def __init__(self, heads: Heads) -> None:
        self.heads = heads if heads is None or hasattr(heads, "shape") else list(heads)

    @contextmanager
    def on(self, model: HeadedModel) -> Iterator[None]:
        """Masks gradients of every backward pass while the block runs.

        Raises:
            InputError: a head the model does not have. UnreadableModelError: projections that cannot be told apart.
        """
        handles = []
        try:
            for parameter, mask in self.masks(model):
                if parameter.requires_grad:
                    handles.append(parameter.register_hook(_masked(mask)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def masks(self, model: HeadedModel) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Every parameter of the projections with its mask: 1 where the gradient passes, of the parameter's shape."""
        chosen = head_mask(self.heads, model.layers, model.heads).bool()
        probe = Probe.run(model)
        found: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
        for at in model.attention_layers:
            own = chosen[at.index, : at.heads].cpu()
            for linear, rows in _rows(model, at, probe, own):
                _set(found, linear, rows.to(linear.weight.device), is_output=False)  # type: ignore[arg-type]
            columns = own.repeat_interleave(at.head_dim).to(model.device)
            _set(found, at.output_projection, columns, is_output=True)
        return list(found.values())


def _rows(
    model: HeadedModel, at: AttentionLayer, probe: Probe, own: torch.Tensor
) -> list[tuple[nn.Module, torch.Tensor]]:
    """The query, key and value projections of a layer, and which of their outputs belong to chosen heads."""
    linears = _linear_children(at.module)
    parts = projections_of(model, at, probe)
    numbered: list[nn.Module] = []  # projections of the same cut whose weights are the numbers of their outputs
    for linear in linears:
        count = _out(linear)
        stand_in = nn.Linear(1, count, bias=False)
        stand_in.weight = nn.Parameter(torch.arange(count, dtype=torch.float64)[:, None])
        numbered.append(stand_in)
    ways = zip(_cuts(linears, at), _cuts(numbered, at), strict=True)
    number = next(n for real, n in ways if all(torch.equal(real[role][0], parts[role][0]) for role in "qkv"))
    masks = [torch.zeros(_out(linear)) for linear in linears]
    for place, role in enumerate("qkv"):
        places = number[role][0][:, 0].long()  # [heads or kv_heads, dim]
        kept = own if role == "q" else own.unflatten(0, (len(places), -1)).any(1)
        masks[place if len(linears) == 3 else 0][places[kept].flatten()] = 1
    return list(zip(linears, masks, strict=True))


def _out(linear: nn.Module) -> int:
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[1 if hasattr(linear, "nf") else 0])  # Conv1D keeps [in, out], Linear [out, in]


def _set(
    found: dict[int, tuple[nn.Parameter, torch.Tensor]], linear: nn.Module, mask: torch.Tensor, is_output: bool
) -> None:
    weight, bias = linear.weight, getattr(linear, "bias", None)
    if not isinstance(weight, nn.Parameter) or id(weight) in found:
        raise InputError(
            f"A {type(linear).__name__} has no weights of one layer alone (quantized, or shared between layers, as in "
            "ALBERT), so single heads of it cannot be tuned; expected plain linear projections."
        )
    along = 0 if is_output == hasattr(linear, "nf") else 1
    shape = [-1, 1] if along == 0 else [1, -1]
    found[id(weight)] = weight, mask.to(weight.dtype).reshape(shape).expand_as(weight)
    if isinstance(bias, nn.Parameter):
        found[id(bias)] = bias, torch.zeros_like(bias) if is_output else mask.to(bias)


def _masked(mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda gradient: gradient * mask
