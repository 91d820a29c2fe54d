"""Heads as parsers: does the word a head looks at stand in a given grammatical relation to the one it looks from?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from polyhead.errors import InputError
from polyhead.headmap import HeadMap
from polyhead.heads.base import Progress, Score
from polyhead.heads.streaming import Pattern, stream_attention
from polyhead.papers import paper

if TYPE_CHECKING:
    from polyhead.model import HeadedModel

__all__ = ["ParsedSentence", "RelationAccuracy", "RelationTable", "word_attention"]


@dataclass(frozen=True)
class ParsedSentence:
    """A sentence and what a parser, or a person, says of it.

    Attributes:
        words: ``[n]``.
        heads: ``[n]``, the index of each word's head word, or -1 for the root and for words to leave out.
        relations: ``[n]``, the name of the relation to the head word.

    Raises:
        InputError: lists of different lengths, or a head word outside the sentence or the word itself.
    """

    words: tuple[str, ...]
    heads: tuple[int, ...]
    relations: tuple[str, ...]

    def __post_init__(self) -> None:
        sizes = (len(self.words), len(self.heads), len(self.relations))
        if len(set(sizes)) > 1 or not sizes[0]:
            raise InputError(f"A parsed sentence has {sizes} words, heads and relations; expected one of each a word.")
        for word, head in enumerate(self.heads):
            if not -1 <= head < sizes[0] or head == word:
                raise InputError(
                    f"Word {word} ({self.words[word]!r}) has the head word {head}; expected another word of the "
                    f"{sizes[0]}, counted from 0, or -1 for none."
                )


def word_attention(weights: torch.Tensor, words: Sequence[int | None], n: int) -> torch.Tensor:
    """Token attention as word attention (bert-attention, section 4.1): sum into a split word, mean from it.

    Args:
        weights: ``[heads, tokens, tokens]``.
        words: ``[tokens]``, the word each token belongs to, None for special tokens and padding.
        n: words.

    Returns:
        ``[heads, n, n]`` in float64; rows sum to less than 1 where a head attends to special tokens.
    """
    belongs = torch.zeros(n, len(words), dtype=torch.float64, device=weights.device)
    for token, word in enumerate(words):
        if word is not None:
            belongs[word, token] = 1
    means = belongs / belongs.sum(1, keepdim=True).clamp(min=1)
    return means @ weights.double() @ belongs.T


@dataclass(frozen=True)
class RelationTable:
    """How often each head finds each relation.

    Attributes:
        hits: relation -> boolean ``[pairs, layers, heads]``, one row a word in that relation.
        offsets: relation -> ``[pairs]``, head word's index less the word's own.
        sentences: relation -> ``[pairs]``, which sentence each is from.
        left_out: pairs whose words the tokenizer cut away or gave no token.
        model: name.
    """

    hits: dict[str, np.ndarray]
    offsets: dict[str, np.ndarray]
    sentences: dict[str, np.ndarray]
    left_out: int
    model: str

    def accuracy(self, relation: str | None = None) -> HeadMap:
        """Share of pairs that each head finds, of one relation or (None) of all.

        Raises:
            InputError: a relation that is not in the data.
        """
        if relation is not None and relation not in self.hits:
            raise InputError(f"No relation {relation!r} in the data; there are {', '.join(sorted(self.hits))}.")
        chosen = list(self.hits.values()) if relation is None else [self.hits[relation]]
        pairs = np.concatenate(chosen)
        data = f"{len(pairs)} pairs of {relation or 'all relations'}"
        return HeadMap(pairs.mean(0), RelationAccuracy.name, self.model, data, RelationAccuracy.higher_means)

    def offset_baseline(self, relation: str) -> tuple[int, float]:
        """The fixed offset that finds the most head words, and the share it finds."""
        values, counts = np.unique(self.offsets[relation], return_counts=True)
        best = int(counts.argmax())
        return int(values[best]), float(counts[best] / counts.sum())

    def best(self) -> list[dict[str, Any]]:
        """For each relation its pairs, best head, that head's accuracy, and the best fixed offset's; best first."""
        rows = []
        for relation, hits in self.hits.items():
            found = self.accuracy(relation)
            (head,) = found.top(1)
            offset, baseline = self.offset_baseline(relation)
            row = {"relation": relation, "pairs": len(hits), "head": head, "accuracy": float(found.values[head])}
            rows.append({**row, "offset": offset, "offset_accuracy": baseline})
        return sorted(rows, key=lambda row: -row["accuracy"])


@paper("bert-attention")
@dataclass
class RelationAccuracy(Score):
    """Share of words whose most attended word is the one they stand in a relation to (bert-attention, section 4.2).

    Attention is taken word to word (:func:`word_attention`); special tokens and the word itself are not candidates.

    Args:
        relation: which relation's accuracy the map shows; None for all pairs together.
        direction: "to-head": each word looks for its head word, as in the paper's main table. "to-dependent": the
            head word looks for its dependent.
        batch_size: sentences a batch.

    Example:
        >>> import polyhead
        >>> model = polyhead.load("all-MiniLM-L6-v2")
        >>> parsed = [ParsedSentence(("The", "old", "king", "sleeps"), (2, 2, 3, -1), ("det", "amod", "nsubj", "root"))]
        >>> table = RelationAccuracy().measure(model, parsed)
        >>> table.accuracy("det").shape
        (6, 12)
    """

    name: ClassVar[str] = "relation-accuracy"
    summary: ClassVar[str] = "share of words whose most attended word is the one a parser relates them to"
    needs: ClassVar[Any] = "relations"
    higher_means: ClassVar[str] = "finds the related word more often"

    relation: str | None = None
    direction: Literal["to-head", "to-dependent"] = "to-head"
    batch_size: int = 16

    def score(
        self, model: HeadedModel, data: Sequence[ParsedSentence] | None = None, *, progress: Progress | None = None
    ) -> HeadMap:
        """See :class:`Score`; there is no default: the pairs come from your parser."""
        return self.measure(model, data, progress=progress).accuracy(self.relation)

    def measure(
        self, model: HeadedModel, data: Sequence[ParsedSentence] | None, *, progress: Progress | None = None
    ) -> RelationTable:
        """All relations of the data at once.

        Raises:
            InputError: no parsed sentences, no pairs in them, or a tokenizer that does not tell words (a slow one).
        """
        if not data or not all(isinstance(one, ParsedSentence) for one in data):
            raise InputError(
                "RelationAccuracy needs a list of ParsedSentence(words, heads, relations) made from a parser's output; "
                f"it was given {type(data).__name__}."
            )
        if self.direction not in ("to-head", "to-dependent"):
            raise InputError(f"direction is {self.direction!r}, expected 'to-head' or 'to-dependent'.")
        if not getattr(model.tokenizer, "is_fast", False):
            raise InputError(f"The tokenizer of '{model.name}' does not say which word a token is of; a fast one does.")
        hits: dict[str, list[np.ndarray]] = {}
        where: dict[str, list[tuple[int, int]]] = {}
        left_out = 0
        for first in range(0, len(data), self.batch_size):
            batch = list(data[first : first + self.batch_size])
            found, dropped = self._batch(model, batch)
            left_out += dropped
            for (sentence, word), row in found.items():
                one = batch[sentence]
                hits.setdefault(one.relations[word], []).append(row)
                where.setdefault(one.relations[word], []).append((first + sentence, one.heads[word] - word))
            if progress is not None:
                progress(first + len(batch), len(data))
        if not hits:
            raise InputError(f"No pairs to find: none of the {len(data)} sentences has a word with a head word.")
        return RelationTable(
            {name: np.stack(rows) for name, rows in hits.items()},
            {name: np.array([offset for _, offset in pairs]) for name, pairs in where.items()},
            {name: np.array([sentence for sentence, _ in pairs]) for name, pairs in where.items()},
            left_out,
            model.name,
        )

    def _batch(
        self, model: HeadedModel, batch: Sequence[ParsedSentence]
    ) -> tuple[dict[tuple[int, int], np.ndarray], int]:
        coded = model.tokenizer(
            [list(one.words) for one in batch],
            is_split_into_words=True,
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        word_of = [coded.word_ids(row) for row in range(len(batch))]
        pairs, dropped = [], 0
        for row, one in enumerate(batch):
            known = set(word_of[row])
            for word, head in enumerate(one.heads):
                if head >= 0 and {word, head} <= known:
                    pairs.append((row, word))
                elif head >= 0:
                    dropped += 1
        found = {pair: np.full((model.layers, model.heads), np.nan) for pair in pairs}

        def visit(pattern: Pattern) -> None:
            for row, one in enumerate(batch):
                n = len(one.words)
                words = word_attention(pattern.weights[row], word_of[row], n)
                present = torch.tensor([word in word_of[row] for word in range(n)], device=words.device)
                words = words.masked_fill(~present | torch.eye(n, dtype=torch.bool, device=words.device), -1.0)
                most = words.argmax(-1).cpu().numpy()
                for at, word in (pair for pair in pairs if pair[0] == row):
                    source, target = (word, one.heads[word])
                    if self.direction == "to-dependent":
                        source, target = target, source
                    found[at, word][pattern.layer, : most.shape[0]] = most[:, source] == target

        stream_attention(model, {key: value.to(model.device) for key, value in coded.items()}, visit)
        return found, dropped
