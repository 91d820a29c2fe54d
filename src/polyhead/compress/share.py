"""Multi-head attention to grouped-query and multi-query attention: key-value heads shared by more query heads."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from polyhead.compress._compare import (
    change_of,
    difference_of,
    output_of,
    quality_of,
    random_inputs,
    report_of,
    tolerance_of,
)
from polyhead.compress.report import Report, cost_of
from polyhead.errors import InputError, UnreadableModelError
from polyhead.heads.tasks import Task
from polyhead.papers import paper
from polyhead.structure import AttentionLayer
from polyhead.surgery import layer_projections
from polyhead.tap import AttentionCall

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["Grouping", "Pool", "alike_groups", "convert_to_gqa", "pool_heads", "tie_key_values"]

Pool = Literal["mean", "first", "random"]
Grouping = Literal["neighbours", "alike"]
Groups = Sequence[Sequence[int]]
_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")


def pool_heads(heads: torch.Tensor, groups: Groups, pool: Pool = "mean", seed: int = 0) -> torch.Tensor:
    """One head for each group of heads.

    Args:
        heads: ``[kv_heads, ...]`` a projection's weights or biases, head by head.
        groups: heads of each group.
        pool: "mean" of the group, its "first" head, or "random" weights as large as the group's.
        seed: of the random ones.

    Returns:
        ``[groups, ...]``.

    Source:
        gqa (Ainslie et al. 2023, section 2.1; the other two are its ablation, section 3.3).

    Example:
        >>> pool_heads(torch.tensor([[1.0], [3.0], [5.0], [9.0]]), [[0, 1], [2, 3]])
        tensor([[2.],
                [7.]])
    """
    picked = [heads[list(group)] for group in groups]
    if pool == "mean":
        return torch.stack([each.mean(0) for each in picked])
    if pool == "first":
        return torch.stack([each[0] for each in picked])
    if pool != "random":
        raise InputError(f"pool={pool!r} was given; expected 'mean', 'first' or 'random'.")
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(each.shape[1:], generator=generator).to(each) * each.square().mean().sqrt() for each in picked]
    return torch.stack(drawn)


def alike_groups(heads: torch.Tensor, count: int) -> list[list[int]]:
    """Groups of equal size whose heads point the same way: the closest first, by cosine of their weights.

    Args:
        heads: ``[kv_heads, ...]`` weights that describe each head.
        count: groups, a divisor of the heads.

    Example:
        >>> alike_groups(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.1, 1.0]]), 2)
        [[0, 2], [1, 3]]
    """
    size = len(heads) // count
    likeness = nn.functional.normalize(heads.flatten(1).double(), dim=1)
    likeness = (likeness @ likeness.T).fill_diagonal_(-torch.inf)
    left, groups = list(range(len(heads))), []
    for _ in range(count):
        among = likeness[left][:, left]
        best = among.topk(size - 1, dim=1) if size > 1 else None
        centre = 0 if best is None else int(best.values.sum(1).argmax())
        others = [] if best is None else [left[i] for i in best.indices[centre].tolist()]
        groups.append(sorted([left[centre], *others]))
        left = [head for head in left if head not in groups[-1]]
    return sorted(groups)


@paper("gqa", "mqa")
def convert_to_gqa(
    model: HeadedModel,
    kv_heads: int,
    *,
    pool: Pool = "mean",
    grouping: Grouping = "neighbours",
    task: Task | None = None,
    seed: int = 0,
) -> tuple[HeadedModel, Report]:
    """A copy of the model with fewer key-value heads, each shared by a larger group of query heads.

    The copy's configuration says so: ``save_pretrained`` writes a folder that plain transformers loads. It gives what
    the original gives with each group's key and value weights replaced by the pooled ones; that is checked on random
    inputs. Train it a little afterwards (the paper: a twentieth of the pretraining steps).

    Args:
        model: whose configuration counts key-value heads for all layers (Llama, Mistral, Qwen, Gemma, Phi-3, ...). It
            stays as it is.
        kv_heads: how many to keep in each layer; a divisor of what there is. 1 gives multi-query attention.
        pool: how a group's weights become one head's: "mean" (the paper's), "first" or "random" (its ablations).
        grouping: "neighbours" as they stand, or "alike" by cosine of key and value weights; query heads move with
            their group, which changes nothing else.
        task: to measure the quality before and after.
        seed: of random weights.

    Raises:
        InputError: a count that does not divide, or an architecture that has no such count.
        UnreadableModelError: projections of another layout.

    Source:
        gqa (Ainslie et al. 2023, section 2), mqa (Shazeer 2019, section 3).

    Example:
        >>> import polyhead
        >>> from transformers import LlamaConfig, LlamaModel
        >>> config = LlamaConfig(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=8)
        >>> smaller, report = convert_to_gqa(polyhead.load(LlamaModel(config)), 2)
        >>> report.before.cache_bytes_per_token, report.after.cache_bytes_per_token
        (1024, 256)
    """
    from polyhead.model import HeadedModel

    if not isinstance(getattr(model.config, "num_key_value_heads", None), int):
        raise InputError(
            f"'{model.name}' ({type(model.module).__name__}) has no num_key_value_heads in its configuration, so its "
            "architecture cannot share key-value heads; expected a model such as Llama, Mistral, Qwen, Gemma or "
            "Phi-3. tie_key_values() shows what sharing would cost in quality."
        )
    groups = _groups_of(model, kv_heads, grouping)
    module: Any = copy.deepcopy(model.module)
    copied = HeadedModel(module, name=model.name, files=model.files)
    for layer, own in zip(copied.attention_layers, groups, strict=True):
        _convert_layer(layer, own, pool, seed + layer.index)
    module.config.num_key_value_heads = kv_heads
    try:
        converted = HeadedModel(module, name=model.name, files=model.files)
    except UnreadableModelError as error:
        raise UnreadableModelError(f"'{model.name}' does not run with {kv_heads} key-value heads: {error}") from error
    inputs = random_inputs(model)
    given, tied = output_of(converted, inputs), _tied(model, groups, pool, seed)
    parity = difference_of(given, output_of(tied, inputs))
    if not parity <= tolerance_of(model) or {each.kv_heads for each in converted.attention_layers} != {kv_heads}:
        raise UnreadableModelError(
            f"'{model.name}' cannot be converted: with {kv_heads} key-value heads its output differs by {parity:.2g} "
            "from that of the original with the same weights shared; its projections are not laid out head by head."
        )
    before_after, metric = quality_of(task, model, converted)
    return converted, Report(
        cost_of(model),
        cost_of(converted),
        parity=parity,
        quality=before_after,
        metric=metric,
        change=change_of(given, output_of(model, inputs)),
        details={"pool": pool, "grouping": grouping, "groups": [[list(each) for each in own] for own in groups]},
    )


def tie_key_values(
    model: HeadedModel,
    kv_heads: int,
    *,
    pool: Pool = "mean",
    grouping: Grouping = "neighbours",
    task: Task | None = None,
    seed: int = 0,
) -> tuple[HeadedModel, Report]:
    """A copy in the model's own shape whose key-value heads are equal within each group.

    It computes what :func:`convert_to_gqa` would, for any architecture, and saves nothing: it shows what sharing
    costs in quality before anything is trained. Arguments and errors are those of :func:`convert_to_gqa`.

    Example:
        >>> import polyhead
        >>> tied, report = tie_key_values(polyhead.load("all-MiniLM-L6-v2"), 6)
        >>> round(report.change, 2)
        0.6
    """
    groups = _groups_of(model, kv_heads, grouping)
    tied = _tied(model, groups, pool, seed)
    return tied, report_of(model, tied, task)


def _groups_of(model: HeadedModel, kv_heads: int, grouping: Grouping) -> list[list[list[int]]]:
    """``[layers][groups]`` key-value heads that become one."""
    found = []
    for layer in model.attention_layers:
        if kv_heads < 1 or layer.kv_heads % kv_heads:
            raise InputError(
                f"{kv_heads} key-value heads were asked for; layer {layer.index} of '{model.name}' has "
                f"{layer.kv_heads}. Give a divisor of that."
            )
        if grouping == "neighbours":
            found.append([list(each) for each in torch.arange(layer.kv_heads).view(kv_heads, -1).tolist()])
        elif grouping == "alike":
            parts = [_heads(*_rows(layer, role), layer).flatten(1) for role in "kv"]
            found.append(alike_groups(torch.cat([each / each.norm() for each in parts], 1), kv_heads))
        else:
            raise InputError(f"grouping={grouping!r} was given; expected 'neighbours' or 'alike'.")
    return found


def _tied(model: HeadedModel, groups: list[list[list[int]]], pool: Pool, seed: int) -> HeadedModel:
    from polyhead.model import HeadedModel

    tied = HeadedModel(copy.deepcopy(model.module), name=model.name, files=model.files)
    for layer, own in zip(tied.attention_layers, groups, strict=True):
        for role in "kv":
            projection, first = _rows(layer, role)
            last = first + layer.kv_heads * layer.head_dim
            for values in _values(projection):
                heads = values[first:last].unflatten(0, (layer.kv_heads, -1))
                pooled = pool_heads(heads, own, pool, seed + layer.index)
                for group, shared in zip(own, pooled, strict=True):
                    heads[list(group)] = shared
    _check_tied(tied, groups)
    return tied


def _check_tied(tied: HeadedModel, groups: list[list[list[int]]]) -> None:
    """Equal weights give equal keys and values within a group, if the rows are really those of the heads."""
    wrong = [at.path for at in tied.attention_layers if not at.uses_interface and layer_projections(at)[1] is not None]

    def watch(layer: int, call: AttentionCall) -> None:
        for states in (call.key, call.value):
            for group in groups[layer]:
                first, rest = states[:, group[0], None], states[:, list(group)]
                if (rest - first).abs().max() > tolerance_of(tied) * first.abs().max().clamp(min=1):
                    wrong.append(tied.attention_layers[layer].path)

    if all(layer.uses_interface for layer in tied.attention_layers):
        with tied.tap_attention(watch):
            output_of(tied, random_inputs(tied))
    if wrong:
        raise UnreadableModelError(
            f"Key-value heads of '{tied.name}' cannot be shared: those of '{wrong[0]}' are not laid out head by head "
            "in its projection."
        )


def _convert_layer(layer: AttentionLayer, groups: list[list[int]], pool: Pool, seed: int) -> None:
    """Put pooled key and value weights, and query heads in the order of their groups, into a layer."""
    share = layer.heads // layer.kv_heads
    order = [key * share + i for group in groups for key in group for i in range(share)]
    output = layer.output_projection.weight
    assert isinstance(output, torch.Tensor)
    output.data = output.data.unflatten(1, (layer.heads, -1))[:, order].flatten(1).contiguous()
    separate, fused = layer_projections(layer)
    query = separate["q"] if fused is None else fused
    for values in _values(query):
        own = values[: layer.heads * layer.head_dim].unflatten(0, (layer.heads, -1))
        own.copy_(own[order])
    parts: dict[int, list[dict[str, torch.Tensor]]] = {}
    for role in "kv":
        projection, first = _rows(layer, role)
        last = first + layer.kv_heads * layer.head_dim
        new = {}
        for name in ("weight", "bias"):
            old: Any = getattr(projection, name, None)
            if old is not None:
                heads = old.data[first:last].unflatten(0, (layer.kv_heads, -1))
                new[name] = pool_heads(heads, groups, pool, seed).flatten(0, 1)
        parts.setdefault(id(projection), []).append(new)
    for projection in [fused] if fused is not None else [separate["k"], separate["v"]]:
        assert projection is not None
        for name in parts[id(projection)][0]:
            old = getattr(projection, name)
            kept = [old.data[: layer.heads * layer.head_dim]] if projection is fused else []
            rows = torch.cat([*kept, *(each[name] for each in parts[id(projection)])])
            setattr(projection, name, nn.Parameter(rows, old.requires_grad))
        projection.out_features = len(projection.weight)  # type: ignore[arg-type, assignment]
    _recount(layer, len(groups))


def _recount(layer: AttentionLayer, kv_heads: int) -> None:
    """Counts that the attention module remembers from its configuration."""
    new = dict.fromkeys(_COUNTS, (layer.kv_heads, kv_heads))
    new["num_key_value_groups"] = (layer.heads // layer.kv_heads, layer.heads // kv_heads)
    for name, (before, after) in new.items():
        if vars(layer.module).get(name) == before:
            setattr(layer.module, name, after)


def _rows(layer: AttentionLayer, role: str) -> tuple[nn.Module, int]:
    """The projection that makes a layer's keys ("k") or values ("v"), and the first of their rows in it."""
    separate, fused = layer_projections(layer)
    if fused is None:
        return separate[role], 0
    return fused, (layer.heads + layer.kv_heads * (role == "v")) * layer.head_dim


def _values(projection: nn.Module) -> list[torch.Tensor]:
    """Weight ``[out, in]`` and bias ``[out]`` to write into."""
    weight, bias = projection.weight, getattr(projection, "bias", None)
    assert isinstance(weight, torch.Tensor)
    rows = weight.data.T if hasattr(projection, "nf") else weight.data  # Conv1D keeps [in, out]
    return [rows] if bias is None else [rows, bias.data]


def _heads(projection: nn.Module, first: int, layer: AttentionLayer) -> torch.Tensor:
    return _values(projection)[0][first : first + layer.kv_heads * layer.head_dim].unflatten(0, (layer.kv_heads, -1))
