"""Cut heads out of a model's weights, and put zeros back in their place where a file needs the stock shape.

Works on what the probe found (:mod:`polyhead.structure`): an attention module with a query, a key and a value
projection, or with one fused projection of three blocks, and an output projection. Query heads that share key-value
heads must stay in groups of one size, as models repeat keys by one factor: where a removal would leave groups unequal,
a removed head keeps its place with zero weights ("padded"). The same where a layer would have no head left.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from polyhead.errors import InputError, UnreadableModelError
from polyhead.structure import AttentionLayer, is_linear

__all__ = ["PRUNED_FILE", "Removal", "layer_projections", "read_pruned", "removal_of", "remove_heads", "stock_state"]

PRUNED_FILE = "polyhead_pruned.json"
FORMAT_VERSION = 1
_HEAD_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTHS = ("all_head_size", "split_size", "inner_dim")


@dataclass
class Removal:
    """What was cut from a module, kept on it: enough to write it back in the stock shape.

    Attributes:
        slots: for each layer the original head at each place that is left.
        heads: ``(layer, head)`` removed, in original numbers.
        padded: those of ``heads`` that keep their place with zero weights.
        cuts: parameter name -> (dimension, original size, indices kept).
    """

    slots: list[list[int]]
    heads: list[tuple[int, int]] = field(default_factory=list)
    padded: list[tuple[int, int]] = field(default_factory=list)
    cuts: dict[str, tuple[int, int, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Plan:
    """Places of one layer after the cut: query heads, key-value heads, and which are zeroed."""

    query: list[int]
    keys: list[int]
    zero: list[int]


def removal_of(root: nn.Module, layers: Sequence[AttentionLayer]) -> Removal:
    """What was cut from ``root`` so far."""
    found = getattr(root, "_polyhead_removal", None)
    return found or Removal([list(range(layer.heads)) for layer in layers])


def remove_heads(root: nn.Module, layers: Sequence[AttentionLayer], heads: Iterable[tuple[int, int]]) -> Removal:
    """Cut heads out of ``root``'s weights, in place.

    Args:
        root: the model; it is not checked here that its forward pass still runs.
        layers: its attention layers.
        heads: ``(layer, head)`` in the numbers of the model as it stands.

    Raises:
        InputError: a head that is not there, or layers that share weights with other heads removed in each.
        UnreadableModelError: projections of another layout.
    """
    chosen: list[set[int]] = [set() for _ in layers]
    for at, head in heads:
        if not (0 <= at < len(layers) and 0 <= head < layers[at].heads):
            raise InputError(f"Head {head} of layer {at} was to be removed; the model has no such head.")
        chosen[at].add(head)
    removal = removal_of(root, layers)
    names = {id(parameter): name for name, parameter in root.named_parameters(remove_duplicate=False)}
    done: dict[int, set[int]] = {}
    for layer in layers:
        gone = chosen[layer.index]
        shared = done.setdefault(id(layer.module), gone)
        if shared != gone:
            raise InputError(
                f"Layer {layer.index} shares its weights with a layer that loses other heads: name the same heads in "
                "all layers of a model that repeats one."
            )
        plan = _plan(layer, gone)
        if shared is gone and gone:
            _cut_layer(layer, plan, names, removal)
        slots = removal.slots[layer.index]
        original = {(layer.index, slots[head]) for head in gone}
        removal.heads = sorted(set(removal.heads) | original)
        left = [slots[head] for head in plan.query]
        removal.slots[layer.index] = left
    gone_now = set(removal.heads)
    removal.padded = sorted(
        (i, head) for i, slots in enumerate(removal.slots) for head in slots if (i, head) in gone_now
    )
    root._polyhead_removal = removal  # type: ignore[assignment]
    return removal


def _plan(layer: AttentionLayer, gone: set[int]) -> _Plan:
    size = layer.heads // layer.kv_heads
    groups = [[k * size + i for i in range(size)] for k in range(layer.kv_heads)]
    kept = {k: [head for head in group if head not in gone] for k, group in enumerate(groups)}
    keys = [k for k in kept if kept[k]] or [0]
    width = max(1, *(len(kept[k]) for k in keys))
    query, zero = [], []
    for k in keys:
        spare = [head for head in groups[k] if head in gone][: width - len(kept[k])]
        query += sorted(kept[k] + spare)
        zero += spare
    return _Plan(query, keys, zero)


def _cut_layer(layer: AttentionLayer, plan: _Plan, names: dict[int, str], removal: Removal) -> None:
    dim, module = layer.head_dim, layer.module
    query, keys, zero = (_features(part, dim) for part in (plan.query, plan.keys, plan.zero))
    with torch.no_grad():
        separate, fused = layer_projections(layer)
        for role, projection in separate.items():
            kept = query if role == "q" else keys
            _cut(projection, 0, kept, names, removal, zero=zero if role == "q" else None)
        if fused is not None:
            first, second = layer.heads * dim, (layer.heads + layer.kv_heads) * dim
            _cut(fused, 0, torch.cat([query, first + keys, second + keys]), names, removal, zero=zero)
        _cut(layer.output_projection, 1, query, names, removal, zero=zero)
    _recount(module, layer, plan)


def _features(heads: list[int], dim: int) -> torch.Tensor:
    return (torch.tensor(heads, dtype=torch.long)[:, None] * dim + torch.arange(dim)).flatten()


def layer_projections(layer: AttentionLayer) -> tuple[dict[str, nn.Module], nn.Module | None]:
    """The query, key and value projections by first letter, or the fused one; sizes must be those of the heads."""
    linear = {
        name: child
        for name, child in layer.module.named_children()
        if is_linear(child) and child is not layer.output_projection
    }
    dim = layer.head_dim
    expected = {"q": layer.heads * dim, "k": layer.kv_heads * dim, "v": layer.kv_heads * dim}
    separate = {name.removeprefix("in_proj_")[0]: child for name, child in linear.items()}
    if len(linear) == 3 and {role: _rows(child) for role, child in separate.items()} == expected:
        return separate, None
    if len(linear) == 1 and _rows(child := next(iter(linear.values()))) == sum(expected.values()):
        return {}, child
    sizes = {name: _rows(child) for name, child in linear.items()}
    raise UnreadableModelError(
        f"Heads cannot be cut out of '{layer.path}': expected projections of {expected} features for query, key and "
        f"value, or one of {sum(expected.values())}; found {sizes}. Gate the heads instead (polyhead.act.Gate)."
    )


def _rows(projection: nn.Module) -> int:
    return _weight(projection).shape[1 if hasattr(projection, "nf") else 0]


def _weight(projection: nn.Module) -> torch.Tensor:
    assert isinstance(projection.weight, torch.Tensor)
    return projection.weight


def _cut(
    projection: nn.Module,
    side: int,
    kept: torch.Tensor,
    names: dict[int, str],
    removal: Removal,
    *,
    zero: torch.Tensor | None = None,
) -> None:
    """Keep some output (side 0) or input (side 1) features of a linear layer; those of ``zero`` become zero."""
    transposed = hasattr(projection, "nf")  # Conv1D keeps [in, out]
    wanted = [("weight", 1 - side if transposed else side)]
    if side == 0 and getattr(projection, "bias", None) is not None:
        wanted.append(("bias", 0))
    for kind, dim in wanted:
        old = getattr(projection, kind)
        value = old.detach().clone()
        if zero is not None and len(zero):
            value.index_fill_(dim, zero.to(value.device), 0.0)
        new = nn.Parameter(value.index_select(dim, kept.to(value.device)).contiguous(), old.requires_grad)
        setattr(projection, kind, new)
        name = names.pop(id(old))
        names[id(new)] = name
        _, size, before = removal.cuts.get(name, (dim, old.shape[dim], torch.arange(old.shape[dim])))
        removal.cuts[name] = (dim, size, before[kept])
    if transposed and side == 0:
        projection.nf = len(kept)  # type: ignore[assignment]
    elif not transposed:
        setattr(projection, "out_features" if side == 0 else "in_features", len(kept))


def _recount(module: nn.Module, layer: AttentionLayer, plan: _Plan) -> None:
    """Head counts and widths that the attention module remembers from its configuration."""
    dim = layer.head_dim
    new = {name: (layer.heads, len(plan.query)) for name in _HEAD_COUNTS}
    new |= {name: (layer.kv_heads, len(plan.keys)) for name in _KV_COUNTS}
    new |= {name: (layer.heads * dim, len(plan.query) * dim) for name in _WIDTHS}
    new["num_key_value_groups"] = (layer.heads // layer.kv_heads, len(plan.query) // len(plan.keys))
    for name, (before, after) in new.items():
        if vars(module).get(name) == before:
            setattr(module, name, after)


def stock_state(root: nn.Module, removal: Removal) -> dict[str, torch.Tensor]:
    """The module's state in the stock shape: zeros where heads were cut out."""
    state = dict(root.state_dict())
    for name, (dim, size, kept) in removal.cuts.items():
        value = state[name]
        shape = list(value.shape)
        shape[dim] = size
        full = torch.zeros(shape, dtype=value.dtype, device=value.device)
        state[name] = full.index_copy_(dim, kept.to(value.device), value)
    return state


def read_pruned(file: Path) -> list[tuple[int, int]]:
    """Removed heads ``(layer, head)`` of a ``polyhead_pruned.json``.

    Raises:
        InputError: the file is not one, or of a later version.
    """
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        version, heads = plain["version"], [(int(layer), int(head)) for layer, head in plain["heads"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{file}' does not list pruned heads: {error!r}. Save the model again.") from error
    if version != FORMAT_VERSION:
        raise InputError(f"'{file}' has version {version}, this Polyhead reads {FORMAT_VERSION}.")
    return heads
