"""Remove heads for good: their weights leave the model."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from polyhead.act.gate import Gate
from polyhead.act.vectors import Heads, head_mask
from polyhead.compress._compare import (
    change_of,
    difference_of,
    output_of,
    quality_of,
    random_inputs,
    tolerance_of,
)
from polyhead.compress.report import Report, cost_of
from polyhead.errors import InputError, UnreadableModelError
from polyhead.heads.tasks import Task
from polyhead.papers import paper
from polyhead.surgery import FORMAT_VERSION, PRUNED_FILE, removal_of, remove_heads, stock_state

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["prune", "save_pruned"]


@paper("sixteen-heads")
def prune(model: HeadedModel, heads: Heads, *, task: Task | None = None) -> tuple[HeadedModel, Report]:
    """A copy of the model without the given heads, and what that saved.

    Rows of the query projection and columns of the output projection go, and a key-value head's rows with the last
    query head that uses it. The copy gives what the original gives with these heads gated to zero; that is checked
    on random inputs before the copy is handed out.

    Args:
        model: with separate query, key and value projections (BERT, Llama, ViT, ...) or GPT-2's fused one. It stays
            as it is.
        heads: a mask ``[layers, heads]`` or a list of ``(layer, head)``; ``HeadMap.mask`` and ``HeadMap.top`` give
            them. Prune the *least* important: ``prune(model, (-importance).top(0.2))``.
        task: to measure the quality before and after.

    Raises:
        InputError: no head named, or one that the model does not have.
        UnreadableModelError: the model needs its head count in places that cannot be cut (T5's position bias).

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> smaller, report = prune(model, [(0, 3), (5, 1), (5, 7)])
        >>> report.before.parameters - report.after.parameters
        147744
    """
    from polyhead.model import HeadedModel

    mask = head_mask(heads, model.layers, model.heads)
    chosen = [(int(layer), int(head)) for layer, head in mask.nonzero().tolist()]
    if not chosen:
        raise InputError("No head to prune was named.")
    module = copy.deepcopy(model.module)
    copied = HeadedModel(module, name=model.name, files=model.files)
    removal = remove_heads(module, copied.attention_layers, chosen)
    parity, change = _parity(model, copied, chosen)
    pruned = HeadedModel(module, name=model.name, files=model.files)
    if [layer.heads for layer in pruned.attention_layers] != [len(slots) for slots in removal.slots]:
        raise UnreadableModelError(
            f"Heads cannot be cut out of '{model.name}': what is left of {type(module).__name__} is no longer read "
            "head by head. Gate the heads instead (polyhead.act.Gate)."
        )
    before_after, metric = quality_of(task, model, pruned)
    report = Report(
        cost_of(model), cost_of(pruned), removal.heads, removal.padded, parity, before_after, metric, change=change
    )
    return pruned, report


def _parity(model: HeadedModel, pruned: HeadedModel, heads: list[tuple[int, int]]) -> tuple[float, float]:
    """Difference to the gated model and change from the original on random inputs."""
    inputs = random_inputs(model)
    try:
        with Gate.off(heads, model).on(model):
            expected = output_of(model, inputs)
        given = output_of(pruned, inputs)
    except RuntimeError as error:
        raise UnreadableModelError(
            f"Heads cannot be cut out of '{model.name}': {type(model.module).__name__} does not run without them "
            f"({error}). Gate them instead (polyhead.act.Gate)."
        ) from error
    difference = difference_of(given, expected)
    if not difference <= tolerance_of(model):
        raise UnreadableModelError(
            f"Heads cannot be cut out of '{model.name}': the result differs by {difference:.2g} from the model with "
            f"these heads gated to zero, more than {tolerance_of(model):g}; its projections are not laid out head by "
            "head. Gate the heads instead (polyhead.act.Gate)."
        )
    return difference, change_of(given, output_of(model, inputs))


def save_pruned(model: HeadedModel, folder: str | Path) -> Path:
    """Write a pruned model so that plain transformers loads it, and ``polyhead.load`` gets the small one back.

    A stock configuration has one head count for all layers. Where every layer kept as many heads, and the
    configuration states its ``head_dim``, the small shape itself is stock and is written. Else weights are written
    with zeros where heads were cut out, in the stock shape, with the list of removed heads in
    ``polyhead_pruned.json``: transformers, which does not read it, computes the same numbers at the old cost;
    ``polyhead.load`` cuts the zeros out again.

    Returns:
        The folder.

    Raises:
        InputError: a module that cannot save itself (no ``save_pretrained``).
    """
    root, target = model.module, Path(folder)
    save: Callable[..., Any] | None = getattr(root, "save_pretrained", None)
    if save is None:
        raise InputError(f"'{model.name}' ({type(root).__name__}) has no save_pretrained: save its state_dict.")
    removal = removal_of(root, model.attention_layers)
    small = _small_config(model)
    target.mkdir(parents=True, exist_ok=True)
    if small is not None:
        save(target)
        small.save_pretrained(target)
        (target / PRUNED_FILE).unlink(missing_ok=True)
    else:
        save(target, state_dict=stock_state(root, removal))
        plain = {"format": "polyhead.pruned", "version": FORMAT_VERSION, "heads": removal.heads}
        (target / PRUNED_FILE).write_text(json.dumps(plain) + "\n", encoding="utf-8")
    if model.files is not None:
        try:
            model.tokenizer.save_pretrained(target)
        except InputError:  # a vision tower has none
            return target
    return target


def _small_config(model: HeadedModel) -> Any | None:
    """A stock configuration of the pruned shape, where there is one."""
    config = copy.deepcopy(model.config)
    shapes = {(layer.heads, layer.kv_heads) for layer in model.attention_layers}
    stated = all(isinstance(getattr(config, name, None), int) for name in ("head_dim", "num_key_value_heads"))
    if len(shapes) > 1 or not stated:
        return None
    config.num_attention_heads, config.num_key_value_heads = shapes.pop()
    with torch.device("meta"):
        built = type(model.module)(config)
    shape = {name: value.shape for name, value in model.module.state_dict().items()}
    return config if {name: value.shape for name, value in built.state_dict().items()} == shape else None
