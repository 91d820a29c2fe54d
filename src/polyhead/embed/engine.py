"""The work of an encoder between its public methods and its backends: texts to chunks to batches to vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from polyhead.embed.backends import Backends
from polyhead.embed.batching import token_batches
from polyhead.embed.chunking import Chunk
from polyhead.embed.facts import ModelFacts
from polyhead.embed.folder import Recipe
from polyhead.embed.tokenizer import TextTokenizer
from polyhead.embed.types import ChunkEmbeddings, Embeddings, OnLong, Progress
from polyhead.errors import InputError

__all__ = ["Engine", "Job", "Window"]


@dataclass(frozen=True)
class Job:
    """How texts are to be encoded: the options of the public methods, and how many texts are known to come."""

    heads: bool
    prompt: str | None
    on_long: OnLong = "chunk"
    overlap: int | None = None
    work: int = 0


@dataclass(frozen=True)
class Window:
    """Texts encoded together.

    Attributes:
        chunks: vectors of the chunks, dense ones not normalised; ``owner`` counts from the window's first text.
        weights: ``[m]``, tokens of each chunk.
        texts: how many texts.
        long: how many of them were too long for the model.
    """

    chunks: ChunkEmbeddings
    weights: np.ndarray
    texts: int
    long: int

    def merged(self) -> Embeddings:
        """One vector a text: the mean of its chunks with their tokens as weights."""
        found = self.chunks
        if len(found) == self.texts:
            return found
        heads = None if found.heads is None else self._means(found.heads)
        return Embeddings(self._means(found.dense), heads)

    def _means(self, vectors: np.ndarray) -> np.ndarray:
        # Owners ascend and skip none, so that each text's chunks are one run of rows.
        owner = self.chunks.owner
        starts = np.searchsorted(owner, np.arange(self.texts))
        shares = self.weights / np.add.reduceat(self.weights, starts)[owner]
        shaped = shares.reshape(-1, *[1] * (vectors.ndim - 1))
        return np.add.reduceat(vectors * shaped, starts, axis=0).astype(np.float32)


class Engine:
    """Tokenizes, splits, batches and runs; dense vectors are not normalised here.

    Args:
        name: of the model, for messages.
        recipe: how vectors are made.
        backends: what runs the model.
    """

    def __init__(self, name: str, recipe: Recipe, backends: Backends) -> None:
        self._name, self._recipe, self._backends = name, recipe, backends
        self._given = 0

    @property
    def facts(self) -> ModelFacts:
        """Facts of the model."""
        return self._backends.facts

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer."""
        return TextTokenizer(self.facts.tokenizer, self.facts.max_tokens)

    def encode(self, texts: Sequence[str], job: Job, progress: Progress | None, first: int = 0) -> Window:
        """Encode texts that are tokenized and sorted together.

        Args:
            texts: of the window.
            job: how.
            progress: called with texts of the window done.
            first: number of the first text, for messages.

        Raises:
            InputError: a text is too long and the job says "error".
        """
        prompt = self.prompt(job.prompt)
        skip = self.tokenizer.prompt_length(prompt) if prompt and not self._recipe.include_prompt else 0
        pieces: list[tuple[int, Chunk]] = []
        long = 0
        for number, ids in enumerate(self.tokenizer.ids([prompt + text for text in texts])):
            if len(ids) <= self.facts.max_tokens:
                pieces.append((number, Chunk(ids, 0, len(texts[number]), len(ids))))
            else:
                long += 1
                pieces += [
                    (number, chunk) for chunk in self._split(texts[number], prompt, len(ids), job, first + number)
                ]
        sequences = [chunk.ids for _, chunk in pieces]
        vectors = self.run(sequences, job.heads, skip, progress, len(texts), job.work)
        owner, start, end, weights = (
            np.asarray(column, dtype=np.int64)
            for column in (
                [number for number, _ in pieces],
                [chunk.start for _, chunk in pieces],
                [chunk.end for _, chunk in pieces],
                # A text without tokens has one chunk all the same, whose weight must not be zero.
                [max(1, chunk.weight) for _, chunk in pieces],
            )
        )
        return Window(ChunkEmbeddings(vectors.dense, vectors.heads, owner, start, end), weights, len(texts), long)

    def run(
        self,
        sequences: Sequence[np.ndarray],
        heads: bool,
        skip: int,
        progress: Progress | None,
        texts: int,
        work: int,
    ) -> Embeddings:
        """Vectors of token sequences, dense ones not normalised; those of empty sequences are zeros.

        Args:
            sequences: token ids ``[tokens]`` each.
            heads: whether heads are wanted.
            skip: tokens at the start of each sequence that are not pooled.
            progress: called with texts done.
            texts: how many texts the sequences are of.
            work: how many texts there are in all, as far as is known.
        """
        result = self.empty(len(sequences), heads)
        if not sequences:
            return result
        # Long work may come in many calls (an index is made batch by batch), none of which knows of the others.
        self._given += len(sequences)
        backend = self._backends.get(self.tokenizer, max(work, self._given))
        done = 0

        def sink(batch: Any, dense: np.ndarray, per_head: np.ndarray | None) -> None:
            nonlocal done
            result.dense[batch.rows] = dense
            if result.heads is not None:
                result.heads[batch.rows] = per_head
            done += len(batch.rows)
            if progress is not None:
                progress(done * texts // len(sequences), None)

        facts = self.facts
        budget = backend.budget(sum(map(len, sequences)))
        batches = token_batches(sequences, budget=budget, pad_id=facts.pad_id, limit=facts.max_tokens)
        backend.run(batches, heads, skip, sink)
        if progress is not None and done < len(sequences):
            progress(texts, None)
        return result

    def empty(self, count: int, heads: bool) -> Embeddings:
        """Zeros for so many texts."""
        facts = self.facts
        shape = (count, len(facts.layers), facts.heads, facts.head_dim)
        return Embeddings(np.zeros((count, facts.dim), np.float32), np.zeros(shape, np.float32) if heads else None)

    def prompt(self, prompt: str | None) -> str:
        """What is put in front of texts where ``prompt`` was asked for; None means the folder's default."""
        if prompt is not None:
            return prompt
        name, known = self._recipe.default_prompt, self._recipe.prompts
        if name is None:
            return ""
        if name not in known:
            raise InputError(f"{self._name} names the default prompt {name!r}, but its prompts are {sorted(known)}")
        return known[name]

    def _split(self, text: str, prompt: str, tokens: int, job: Job, number: int) -> list[Chunk]:
        if job.on_long == "error":
            raise InputError(
                f"text {number} ({text[:40]!r}…) has {tokens} tokens; {self._name} takes {self.facts.max_tokens}: "
                'shorten it, or use on_long="chunk"'
            )
        if job.on_long == "truncate":
            return [self.tokenizer.truncate(text, prompt)]
        return self.tokenizer.split(text, prompt, job.overlap)
