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
from polyhead.compress.report import Report, cost_of
from polyhead.errors import InputError, UnreadableModelError
from polyhead.heads.tasks import Task, run_task
from polyhead.papers import paper
from polyhead.structure import probe_inputs
from polyhead.surgery import FORMAT_VERSION, PRUNED_FILE, removal_of, remove_heads, stock_state

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["prune", "save_pruned"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
    parity = _parity(model, copied, chosen)
    pruned = HeadedModel(module, name=model.name, files=model.files)
    if [layer.heads for layer in pruned.attention_layers] != [len(slots) for slots in removal.slots]:
        raise UnreadableModelError(
            f"Heads cannot be cut out of '{model.name}': what is left of {type(module).__name__} is no longer read "
            "head by head. Gate the heads instead (polyhead.act.Gate)."
        )
    quality = None
    if task is not None:
        found = [run_task(task, each) for each in (model, pruned)]
        before, after = (task.quality(each, torch.arange(len(each)).numpy()) for each in found)
        quality = (before, after)
    report = Report(
        cost_of(model), cost_of(pruned), removal.heads, removal.padded, parity, quality, task.metric if task else ""
    )
    return pruned, report


def _parity(model: HeadedModel, pruned: HeadedModel, heads: list[tuple[int, int]]) -> float:
    """Largest difference between the pruned model and the gated one on random inputs, over the largest output."""
    inputs = _random_inputs(model)
    training = model.module.training
    model.module.eval()
    pruned.module.eval()
    try:
        with torch.no_grad():
            with Gate.off(heads, model).on(model):
                expected = _first_output(model(**inputs)).double()
            given = _first_output(pruned(**inputs)).double()
    except RuntimeError as error:
        raise UnreadableModelError(
            f"Heads cannot be cut out of '{model.name}': {type(model.module).__name__} does not run without them "
            f"({error}). Gate them instead (polyhead.act.Gate)."
        ) from error
    finally:
        model.module.train(training)
        pruned.module.train(training)
    difference = float((given - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    limit = _TOLERANCE.get(model.dtype, 1e-5)
    if not difference <= limit:
        raise UnreadableModelError(
            f"Heads cannot be cut out of '{model.name}': the result differs by {difference:.2g} from the model with "
            f"these heads gated to zero, more than {limit:g}; its projections are not laid out head by head. Gate the "
            "heads instead (polyhead.act.Gate)."
        )
    return difference


def _random_inputs(model: HeadedModel) -> dict[str, torch.Tensor]:
    """Two inputs of the kind the model takes, the same every time."""
    generator = torch.Generator().manual_seed(0)
    inputs = probe_inputs(model.module)
    key, value = next(iter(inputs.items()))
    if value.is_floating_point():
        made = torch.randn(2, *value.shape[1:], generator=generator).to(value.device, value.dtype)
        return {key: made}
    vocabulary = int(getattr(model.config, "vocab_size", None) or 8)
    ids = torch.randint(vocabulary, (2, 12), generator=generator).to(value.device)
    ids[:, -1] = value[0, -1]
    return {key: ids, "attention_mask": torch.ones_like(ids)}


def _first_output(outputs: Any) -> torch.Tensor:
    found: torch.Tensor = outputs[0]
    return found


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
