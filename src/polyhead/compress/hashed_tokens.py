"""A model's token embedding as a hash embedding: fewer rows than tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from polyhead.compress._compare import report_of
from polyhead.compress.hashing import HashEmbedding, collisions
from polyhead.compress.report import Report
from polyhead.errors import InputError, UnreadableModelError
from polyhead.heads.tasks import Task
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["HashedTokens", "hash_tokens", "token_counts"]


class HashedTokens(nn.Module):
    """Stands in for ``nn.Embedding``: token ids -> sums of a small table's rows.

    Args:
        rows, dim, hashes, seed: of the :class:`HashEmbedding`.
        tokens: of the vocabulary it stands for.
        scale: factor of what is looked up (Gemma's).
    """

    def __init__(self, rows: int, dim: int, hashes: int, tokens: int, *, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.table = HashEmbedding(rows, dim, hashes, seed)
        self.num_embeddings, self.embedding_dim, self.scale = tokens, dim, scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids ``[...]`` -> ``[..., dim]``."""
        found: torch.Tensor = self.table(ids) * self.scale
        return found


def token_counts(model: HeadedModel, texts: Sequence[str]) -> torch.Tensor:
    """``[vocabulary]`` how often each token occurs in texts, special ones included."""
    counts = np.zeros(model.module.get_input_embeddings().num_embeddings, np.int64)  # type: ignore[operator]
    for text in texts:
        np.add.at(counts, model.tokenizer(text, truncation=True)["input_ids"], 1)
    return torch.from_numpy(counts)


@paper("multi-hash-embed")
def hash_tokens(
    model: HeadedModel,
    rows: int,
    *,
    hashes: int = 4,
    counts: torch.Tensor | None = None,
    task: Task | None = None,
    seed: int = 0,
) -> tuple[HeadedModel, Report]:
    """A copy whose token embedding is a sum of ``hashes`` rows of a table of ``rows``, as near to the old as it gets.

    The table minimises ``sum over tokens of weight |sum of its rows - its old vector|^2``, where the weight of a token
    is one plus its count. Train it afterwards: a quarter of the rows cannot hold all vectors.

    Args:
        model: whose output does not use the same table. It stays as it is.
        rows: of the new table.
        hashes: rows a token, 1 to 4.
        counts: ``[vocabulary]`` how often tokens occur (:func:`token_counts`), so that frequent ones fit better.
        task: to measure the quality before and after.
        seed: of the hash.

    Raises:
        InputError: not fewer rows than tokens, or counts of another vocabulary.
        UnreadableModelError: no token embedding, one that is shared with the output, or of another build.

    Source:
        multi-hash-embed (Miranda et al. 2022, section 2.1); the fit to an old table is ours.

    Example:
        >>> import polyhead
        >>> smaller, report = hash_tokens(polyhead.load("all-MiniLM-L6-v2"), 8000)
        >>> report.before.parameters, report.after.parameters
        (22713216, 14064768)
    """
    from polyhead.model import HeadedModel

    module: Any = copy.deepcopy(model.module)
    old = _embedding_of(model, module)
    tokens, dim = old.weight.shape
    if not 1 <= rows < tokens or (counts is not None and counts.shape != (tokens,)):
        given = "none" if counts is None else str(list(counts.shape))
        raise InputError(
            f"rows={rows} and counts {given} were given; expected 1 to {tokens - 1} rows, counts [{tokens}]."
        )
    made = HashedTokens(rows, dim, hashes, tokens, scale=float(getattr(old, "embed_scale", 1.0)), seed=seed)
    keys = torch.arange(tokens)
    weights = torch.ones(tokens) if counts is None else 1.0 + counts.float().cpu()
    table = _fitted(made.table.rows_of(keys), old.weight.detach().float().cpu(), weights, rows)
    lost = nn.functional.embedding_bag(made.table.rows_of(keys), table, mode="sum") - old.weight.detach().float().cpu()
    made.table.weight.data = table
    made.to(old.weight)
    module.set_input_embeddings(made)
    smaller = HeadedModel(module, name=model.name, files=model.files)
    weighted = weights[:, None] * torch.stack([lost.square(), old.weight.detach().float().cpu().square()]).sum(2).T
    details = {
        "rows": rows,
        "hashes": hashes,
        "share of the embedding lost": float(weighted[:, 0].sum() / weighted[:, 1].sum()),
        **collisions(keys, made.table),
    }
    return smaller, report_of(model, smaller, task, details=details)


def _embedding_of(model: HeadedModel, module: Any) -> Any:
    """The input embedding of a copy, if it can be replaced."""
    try:
        old = module.get_input_embeddings()
        out = module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        old, out = getattr(module, "get_input_embeddings", lambda: None)(), None
    if not isinstance(old, nn.Embedding):
        raise UnreadableModelError(f"'{model.name}' has no token embedding to make smaller; expected a text model.")
    if out is not None and out.weight is old.weight:
        raise UnreadableModelError(
            f"The output of '{model.name}' shares its token embedding, so that nothing would be saved; load it without "
            "its language-model head (lm_head=False)."
        )
    ids = torch.arange(min(8, old.num_embeddings), device=old.weight.device)
    if not torch.allclose(old(ids), old.weight[ids] * getattr(old, "embed_scale", 1.0)):
        raise UnreadableModelError(f"The token embedding of '{model.name}' does more than look rows up.")
    return old


def _fitted(rows: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor, count: int) -> torch.Tensor:
    """The table ``[count, dim]`` whose sums of ``rows [tokens, hashes]`` are nearest to ``wanted [tokens, dim]``.

    Conjugate gradients on the normal equations, all features at once; a little ridge, since rows may be unused.
    """

    def sums(table: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding_bag(rows, table, mode="sum")

    def back(states: torch.Tensor) -> torch.Tensor:
        found = states.new_zeros(count, states.shape[1])
        for at in range(rows.shape[1]):
            found.index_add_(0, rows[:, at], states)
        return found

    table = wanted.new_zeros(count, wanted.shape[1])
    rest = back(weights[:, None] * wanted)
    step, length = rest.clone(), rest.square().sum(0)
    start = length.clone()
    for _ in range(200):
        pushed = back(weights[:, None] * sums(step)) + 1e-4 * step
        ratio = length / (step * pushed).sum(0).clamp_min(1e-30)
        table += ratio * step
        rest -= ratio * pushed
        after = rest.square().sum(0)
        if bool((after <= 1e-10 * start).all()):
            break
        step = rest + (after / length.clamp_min(1e-30)) * step
        length = after
    return table
