"""What a head's attention looks like: entropy, distance, special tokens, neighbours; all from one streaming pass."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from polyhead.data import load_texts
from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Progress, Score
from polyhead.heads.streaming import Pattern, check_texts, stream_attention, text_batches
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = [
    "AttentionDistance",
    "AttentionEntropy",
    "BroadAttention",
    "DelimiterAttention",
    "NextTokenAttention",
    "PreviousTokenAttention",
    "ProfileScore",
    "PunctuationAttention",
    "SameTokenAttention",
    "attention_profile",
    "head_distance",
]

# Each statistic is a mean over queries of sum_j weight_ij * f(i, j); this is what a high value says of the head.
MEANINGS = {
    "entropy": "spreads its attention over more tokens",
    "broad": "attends more evenly to all it may see",
    "distance": "looks further away, in tokens",
    "delimiter": "attends more to special tokens such as [CLS] and [SEP]",
    "punctuation": "attends more to punctuation",
    "previous": "attends more to the token before",
    "next": "attends more to the token after",
    "same": "attends more to the token itself",
}
_OFFSETS = {"previous": -1, "next": 1, "same": 0}


@paper("bert-attention")
def attention_profile(
    model: HeadedModel,
    texts: Sequence[str],
    *,
    max_tokens: int = 256,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[str, HeadMap]:
    """Eight statistics of every head's attention (Clark et al. 2019, bert-attention, section 3), in one pass.

    Each is the mean over all tokens (padding apart), special tokens among them, of a number a query: ``entropy``
    (nats); ``broad``, entropy over the logarithm of how many tokens the query may see, 1 where it attends evenly;
    ``distance``, mean ``|i - j|``; and the attention mass on special tokens (``delimiter``), on ``punctuation``, on
    the ``previous``, ``next`` and ``same`` token. A mean leaves out queries for which its number is not defined (no
    token before the first, nothing to spread over); where that is all of them, the value is NaN.

    Args:
        model: any text model with its tokenizer.
        texts: to read, cut at ``max_tokens``.
        max_tokens, batch_size: one layer's ``[batch, heads, tokens, tokens]`` is held at a time.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> profile = attention_profile(model, ["A head that looks back.", "Another, that does not."])
        >>> profile["previous"].shape
        (6, 12)
    """
    texts = check_texts(texts, "attention_profile")
    sums = {name: np.zeros((model.layers, model.heads)) for name in MEANINGS}
    counts = {name: np.zeros((model.layers, model.heads)) for name in MEANINGS}
    special = set(model.tokenizer.all_special_ids)
    for inputs in text_batches(model, texts, batch_size, max_tokens, progress):
        ids = inputs["input_ids"]
        kinds = {
            "delimiter": torch.isin(ids, torch.tensor(sorted(special), device=ids.device)),
            "punctuation": _punctuation(model.tokenizer, ids, special),
        }

        def visit(pattern: Pattern, kinds: dict[str, torch.Tensor] = kinds) -> None:
            for name, (values, defined) in _statistics(pattern, kinds).items():
                heads = pattern.weights.shape[1]
                kept = torch.where(defined[:, None], values.double(), 0.0).sum((0, 2))
                sums[name][pattern.layer, :heads] += kept.cpu().numpy()
                counts[name][pattern.layer, :heads] += int(defined.sum())

        stream_attention(model, inputs, visit)
    data = f"{len(texts)} texts"
    with np.errstate(invalid="ignore"):
        return {
            name: HeadMap(sums[name] / counts[name], f"attention-{name}", model.name, data, MEANINGS[name])
            for name in MEANINGS
        }


def _statistics(pattern: Pattern, kinds: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per statistic: a number a query ``[batch, heads, queries]``, and where it is defined ``[batch, queries]``."""
    weights, allowed = pattern.weights, pattern.allowed[:, 0]
    queries, keys = weights.shape[-2:]
    real, sees = allowed.any(-1), allowed.sum(-1)
    rows = torch.arange(queries, device=weights.device)[:, None] + keys - queries
    columns = torch.arange(keys, device=weights.device)[None]
    entropy = -torch.xlogy(weights, weights).sum(-1)
    found = {
        "entropy": (entropy, real),
        "broad": (entropy / sees.clamp(min=2).log()[:, None], sees > 1),
        "distance": ((weights * (rows - columns).abs()).sum(-1), real),
    }
    for name, kind in kinds.items():
        found[name] = ((weights * kind[:, None, None, :]).sum(-1), real)
    for name, offset in _OFFSETS.items():
        at = columns - rows == offset
        found[name] = ((weights * at).sum(-1), (allowed & at).any(-1))
    return found


def _punctuation(tokenizer: Any, ids: torch.Tensor, special: set[int]) -> torch.Tensor:
    def is_punctuation(token: int) -> bool:
        text = "" if token in special else tokenizer.decode([token]).strip()
        return bool(text) and all(unicodedata.category(letter).startswith("P") for letter in text)

    chosen = [token for token in ids.unique().tolist() if is_punctuation(token)]
    return torch.isin(ids, torch.tensor(chosen, dtype=ids.dtype, device=ids.device))


@paper("bert-attention")
def head_distance(
    model: HeadedModel,
    texts: Sequence[str],
    *,
    rows: int = 8,
    max_tokens: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> np.ndarray:
    """How differently each two heads attend, ``[layers * heads, layers * heads]`` (bert-attention, section 6).

    The mean over queries of the Jensen-Shannon divergence between the two heads' attention, in nats. Of each text
    ``rows`` queries are drawn, so that all heads' rows for one text fit beside one layer's attention.

    Args:
        model: any text model whose layers have the same number of heads.
        texts: to read, one at a time.
        rows: queries drawn from each.
        max_tokens: texts are cut there.
        seed: of the draw.
    """
    texts = check_texts(texts, "head_distance")
    if len({layer.heads for layer in model.attention_layers}) > 1:
        raise InputError(f"'{model.name}' has layers with different numbers of heads; head_distance needs one number.")
    random = np.random.default_rng(seed)
    count = model.layers * model.heads
    total, queries = np.zeros((count, count)), 0
    for inputs in text_batches(model, texts, 1, max_tokens, progress):
        tokens = inputs["input_ids"].shape[1]
        drawn = torch.as_tensor(np.sort(random.choice(tokens, min(rows, tokens), replace=False)))
        kept: list[torch.Tensor] = []

        def visit(pattern: Pattern, kept: list[torch.Tensor] = kept, drawn: torch.Tensor = drawn) -> None:
            kept.append(pattern.weights[0][:, drawn])

        stream_attention(model, inputs, visit)
        weights = torch.cat(kept).double()  # [layers * heads, rows, keys]
        entropy = -torch.xlogy(weights, weights).sum(-1)
        for head in range(count):
            mixed = (weights + weights[head]) / 2
            apart = -torch.xlogy(mixed, mixed).sum(-1) - (entropy + entropy[head]) / 2
            total[head] += apart.sum(-1).cpu().numpy()
        queries += len(drawn)
    return np.maximum(total / queries, 0.0)


@dataclass
class ProfileScore:
    """One statistic of :func:`attention_profile` as a score; see there for its definition. Classes below name it.

    Args:
        max_tokens: texts are cut there.
        batch_size: texts a batch.
    """

    needs: ClassVar[Any] = "texts"
    statistic: ClassVar[str]

    max_tokens: int = 256
    batch_size: int = 8

    def score(
        self, model: HeadedModel, data: Sequence[str] | None = None, *, progress: Progress | None = None
    ) -> HeadMap:
        """See :class:`Score`; without data, 64 news texts."""
        given = load_texts("ag-news", 64) if data is None else data
        profile = attention_profile(
            model, given, max_tokens=self.max_tokens, batch_size=self.batch_size, progress=progress
        )
        return profile[self.statistic]


@paper("bert-attention")
class AttentionEntropy(ProfileScore, Score):
    """Mean entropy of a head's attention, in nats; see :func:`attention_profile`."""

    name: ClassVar[str] = "attention-entropy"
    summary: ClassVar[str] = "entropy of the attention, in nats"
    higher_means: ClassVar[str] = MEANINGS["entropy"]
    statistic: ClassVar[str] = "entropy"


@paper("bert-attention")
class BroadAttention(ProfileScore, Score):
    """Entropy over its largest possible value: 1 for a head that attends evenly; see :func:`attention_profile`."""

    name: ClassVar[str] = "attention-broad"
    summary: ClassVar[str] = "how evenly a head attends: entropy over its largest possible value, 0 to 1"
    higher_means: ClassVar[str] = MEANINGS["broad"]
    statistic: ClassVar[str] = "broad"


@paper("bert-attention")
class AttentionDistance(ProfileScore, Score):
    """Mean distance in tokens between a query and what it attends to; see :func:`attention_profile`."""

    name: ClassVar[str] = "attention-distance"
    summary: ClassVar[str] = "mean distance in tokens to what is attended to"
    higher_means: ClassVar[str] = MEANINGS["distance"]
    statistic: ClassVar[str] = "distance"


@paper("bert-attention")
class DelimiterAttention(ProfileScore, Score):
    """Attention to the tokenizer's special tokens; see :func:`attention_profile`."""

    name: ClassVar[str] = "attention-delimiter"
    summary: ClassVar[str] = "attention to special tokens such as [CLS], [SEP] or a beginning-of-text token"
    higher_means: ClassVar[str] = MEANINGS["delimiter"]
    statistic: ClassVar[str] = "delimiter"


@paper("bert-attention")
class PunctuationAttention(ProfileScore, Score):
    """Attention to punctuation marks; see :func:`attention_profile`."""

    name: ClassVar[str] = "attention-punctuation"
    summary: ClassVar[str] = "attention to punctuation marks"
    higher_means: ClassVar[str] = MEANINGS["punctuation"]
    statistic: ClassVar[str] = "punctuation"


@paper("bert-attention")
class PreviousTokenAttention(ProfileScore, Score):
    """Attention to the token before; see :func:`attention_profile`."""

    name: ClassVar[str] = "attention-previous"
    summary: ClassVar[str] = "attention to the token before"
    higher_means: ClassVar[str] = MEANINGS["previous"]
    statistic: ClassVar[str] = "previous"


@paper("bert-attention")
class NextTokenAttention(ProfileScore, Score):
    """Attention to the token after; see :func:`attention_profile`. Not defined for a causal model."""

    name: ClassVar[str] = "attention-next"
    summary: ClassVar[str] = "attention to the token after (models that attend in both directions)"
    higher_means: ClassVar[str] = MEANINGS["next"]
    statistic: ClassVar[str] = "next"

    def score(
        self, model: HeadedModel, data: Sequence[str] | None = None, *, progress: Progress | None = None
    ) -> HeadMap:
        """See :class:`ProfileScore`."""
        found = super().score(model, data, progress=progress)
        if np.isnan(found.values).all():
            raise InputError(f"'{model.name}' is causal: no token may look at the next one. Use attention-previous.")
        return found


@paper("bert-attention")
class SameTokenAttention(ProfileScore, Score):
    """Attention of a token to itself; see :func:`attention_profile`."""

    name: ClassVar[str] = "attention-same"
    summary: ClassVar[str] = "attention of a token to itself"
    higher_means: ClassVar[str] = MEANINGS["same"]
    statistic: ClassVar[str] = "same"
