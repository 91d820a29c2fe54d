"""Texts to dense vectors and per-head vectors, in one pass through the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from polyhead.embed.backends import Backends
from polyhead.embed.cache import EncoderCache
from polyhead.embed.engine import Engine, Job, Window
from polyhead.embed.facts import ModelFacts
from polyhead.embed.fingerprint import fingerprint_of
from polyhead.embed.folder import read_recipe
from polyhead.embed.tokens import TokenVectors, token_vectors
from polyhead.embed.types import ChunkEmbeddings, Embeddings, LongTextWarning, OnLong, Progress
from polyhead.errors import InputError
from polyhead.hub import DEFAULT_MODEL, resolve

if TYPE_CHECKING:
    from polyhead.pooling import Pooler

__all__ = ["Encoder"]

# Texts tokenized and sorted together: enough for batches of like lengths, few enough to hold.
WINDOW = 4096


class Encoder:
    """Encodes texts with a model, as its sentence-transformers folder (or a plain folder's defaults) says.

    Plain folders get mean pooling, or the last token where the model is causal, and no normalisation. A text without
    a single token (an empty text under a tokenizer that adds no special tokens) has vectors of zeros; where special
    tokens are added, an empty text is encoded as these alone.

    Constructing loads no weights. ``name``, ``fingerprint`` and, once a model was used on this machine, ``dim``,
    ``head_shape`` and ``max_tokens`` need neither torch nor the model.

    Args:
        model: folder, ``.gguf`` file, short name of a packaged model, or hub id.
        backend: "torch", "openvino", or "auto": what :meth:`calibrate` found fastest on this machine, now or in an
            earlier run. Long work (2,000 texts) calibrates by itself; before that, auto is torch.
        precision: "fp32", "bf16", or "auto": on OpenVINO bf16 where the processor computes in it, else fp32.
        layers: layers whose heads are given; negative ones count from the last.
        pooling: name of a pooling (:data:`polyhead.pooling.POOLERS`) that replaces the folder's, or a
            :class:`polyhead.pooling.Pooler`, of which a copy is kept; several vectors a text are laid side by side.
        device: torch device; ``None`` takes CUDA where there is one.
        cache_dir: where exports and calibrations are kept; ``None`` takes ``cache`` under ``POLYHEAD_HOME``.
        max_tokens: a lower limit on input length than the model's.

    Raises:
        ModelNotFoundError: no such model.
        InputError: the folder asks for modules that are not understood, or an argument is not one of those above.

    Example:
        >>> from polyhead.embed import Encoder
        >>> found = Encoder("all-MiniLM-L6-v2", backend="torch").encode(["heads", "tails"], heads=True)
        >>> found.dense.shape, found.heads.shape
        ((2, 384), (2, 1, 12, 32))
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        backend: Literal["auto", "torch", "openvino"] = "auto",
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        layers: Sequence[int] = (-1,),
        pooling: str | Pooler | None = None,
        device: str | None = None,
        cache_dir: str | Path | None = None,
        max_tokens: int | None = None,
    ) -> None:
        _expect("backend", backend, ("auto", "torch", "openvino"))
        _expect("precision", precision, ("auto", "fp32", "bf16"))
        if backend == "openvino" and device not in (None, "cpu"):
            raise InputError(
                f"device = {device!r} with backend='openvino', which runs on the CPU here; use backend='torch'"
            )
        if not layers:
            raise InputError("layers is empty; name at least one layer, such as -1 for the last")
        found = resolve(str(model))
        self.name = found.name
        recipe = read_recipe(found.path if found.gguf_file is None else Path(found.path) / found.gguf_file)
        if pooling is not None:
            recipe = recipe.with_pooling(pooling)
        self._recipe = recipe
        self.prompts = dict(recipe.prompts)
        self.fingerprint = fingerprint_of(recipe, layers, max_tokens)
        cache = EncoderCache(self.fingerprint, cache_dir)
        self._backends = Backends(recipe, tuple(layers), max_tokens, cache, (backend, precision, device))
        self._engine = Engine(self.name, recipe, self._backends)

    @property
    def _facts(self) -> ModelFacts:
        return self._backends.facts

    @property
    def dim(self) -> int:
        """Length of the dense vector."""
        return self._facts.dim

    @property
    def head_shape(self) -> tuple[int, int, int]:
        """``(layers, heads, head_dim)`` of the per-head vectors."""
        return len(self._facts.layers), self._facts.heads, self._facts.head_dim

    @property
    def head_layers(self) -> tuple[int, ...]:
        """The layers of the per-head vectors, counted from 0, in their order."""
        return self._facts.layers

    @property
    def max_tokens(self) -> int:
        """The longest input, special tokens included; longer texts are split into chunks."""
        return self._facts.max_tokens

    @property
    def normalizes(self) -> bool:
        """Whether the model's folder gives dense vectors of length 1."""
        return self._recipe.normalizes

    @property
    def backend(self) -> str:
        """What encodes now: backend and precision, such as "openvino bf16"; "" before the first text."""
        return self._backends.current

    def tokens(self, text: str) -> np.ndarray:
        """Token ids ``[tokens]`` of a text as :meth:`encode` sees it, special tokens included, nothing cut."""
        return self._engine.tokenizer.ids([text])[0]

    def calibrate(self, progress: Progress | None = None) -> dict[str, Any]:
        """Time the backends that agree with torch in float32 on this machine, take the fastest and remember it.

        Takes seconds: the model is loaded and, where OpenVINO is installed, exported once.

        Args:
            progress: called after each candidate.

        Returns:
            ``{"backend", "precision", "candidates": [{"backend", "precision", "min_cosine", "texts_per_second"}]}``
        """
        return self._backends.calibrate(self._engine.tokenizer, progress)

    def encode(
        self,
        texts: Sequence[str],
        *,
        heads: bool = False,
        prompt: str | None = None,
        normalize: bool | None = None,
        progress: Progress | None = None,
        on_long: OnLong = "chunk",
    ) -> Embeddings:
        """Encode texts; the result has their order.

        Args:
            texts: what to encode.
            heads: whether to give per-head vectors too.
            prompt: put in front of each text; ``None`` takes the folder's default prompt, "" none.
            normalize: whether dense vectors get length 1; ``None`` does as the folder says.
            progress: called with texts done and texts in all.
            on_long: texts longer than ``max_tokens`` are split, and the vectors of their chunks averaged with their
                tokens as weights, before normalisation ("chunk"), cut ("truncate"), or refused ("error").

        Raises:
            InputError: something other than strings, or a long text under "error".

        Warns:
            LongTextWarning: once a call, with the number of texts that were split or cut.
        """
        _expect("on_long", on_long, ("chunk", "truncate", "error"))
        checked = _strings(texts)
        result = self._engine.empty(len(checked), heads)
        long = 0
        for first, window in self._windows(checked, Job(heads, prompt, on_long, work=len(checked)), progress):
            merged = window.merged()
            result.dense[first : first + window.texts] = merged.dense
            if result.heads is not None:
                result.heads[first : first + window.texts] = merged.heads
            long += window.long
        self._normalize(result.dense, normalize)
        _say_long(long, len(checked), on_long)
        return result

    def encode_query(self, texts: Sequence[str], **options: Any) -> Embeddings:
        """:meth:`encode` with the folder's "query" prompt, where it has one."""
        return self.encode(texts, **{"prompt": self.prompts.get("query"), **options})

    def encode_document(self, texts: Sequence[str], **options: Any) -> Embeddings:
        """:meth:`encode` with the folder's "document" (or "passage", or "corpus") prompt, where it has one."""
        named = [self.prompts[name] for name in ("document", "passage", "corpus") if name in self.prompts]
        return self.encode(texts, **{"prompt": named[0] if named else None, **options})

    def encode_chunks(
        self,
        texts: Sequence[str],
        *,
        heads: bool = False,
        prompt: str | None = None,
        overlap: int | None = None,
        normalize: bool | None = None,
        progress: Progress | None = None,
    ) -> ChunkEmbeddings:
        """Encode texts, long ones as several overlapping chunks with a vector each.

        Args:
            texts: what to encode.
            heads: whether to give per-head vectors too.
            prompt: put in front of each chunk; ``None`` takes the folder's default prompt, "" none.
            overlap: tokens shared by neighbouring chunks; ``None`` takes 32, or a quarter of ``max_tokens`` where
                that is less.
            normalize: whether dense vectors get length 1; ``None`` does as the folder says.
            progress: called with texts done and texts in all.
        """
        checked = _strings(texts)
        found = self._engine.empty(0, heads)
        none = np.zeros(0, dtype=np.int64)
        parts = [ChunkEmbeddings(found.dense, found.heads, none, none, none)]
        job = Job(heads, prompt, overlap=overlap, work=len(checked))
        for first, window in self._windows(checked, job, progress):
            window.chunks.owner += first
            parts.append(window.chunks)
        columns = [
            np.concatenate([getattr(part, name) for part in parts]) for name in ("dense", "owner", "start", "end")
        ]
        per_head = np.concatenate([part.heads for part in parts if part.heads is not None]) if heads else None
        self._normalize(columns[0], normalize)
        return ChunkEmbeddings(columns[0], per_head, *columns[1:])

    def encode_stream(
        self,
        texts: Iterable[str],
        *,
        heads: bool = False,
        prompt: str | None = None,
        normalize: bool | None = None,
        progress: Progress | None = None,
        on_long: OnLong = "chunk",
        window: int = WINDOW,
    ) -> Iterator[Embeddings]:
        """Encode texts from an iterator of any length in constant memory, ``window`` texts at a time, in order.

        A window that was given is finished: stopping (Ctrl-C included) loses at most the window in work.

        Args:
            texts: what to encode; read one window ahead of what is given.
            heads: whether to give per-head vectors too.
            prompt: put in front of each text; ``None`` takes the folder's default prompt, "" none.
            normalize: whether dense vectors get length 1; ``None`` does as the folder says.
            progress: called with texts done and ``None``.
            on_long: as in :meth:`encode`.
            window: texts in each result but the last.

        Warns:
            LongTextWarning: once, at the end, with the number of texts that were split or cut.
        """
        _expect("on_long", on_long, ("chunk", "truncate", "error"))
        if window < 1:
            raise InputError(f"window = {window}, expected at least 1 text")
        return self._stream(iter(texts), Job(heads, prompt, on_long), normalize, progress, window)

    def _stream(
        self, texts: Iterator[str], job: Job, normalize: bool | None, progress: Progress | None, window: int
    ) -> Iterator[Embeddings]:
        done = long = 0
        while some := list(islice(texts, window)):
            for _, part in self._windows(_strings(some, done), job, _shifted(progress, done, None), window):
                found = part.merged()
                self._normalize(found.dense, normalize)
                # Without the chunks' columns, which the caller has no use for.
                yield Embeddings(found.dense, found.heads)
                done, long = done + part.texts, long + part.long
        _say_long(long, done, job.on_long)

    def _windows(
        self, texts: Sequence[str], job: Job, progress: Progress | None, window: int = WINDOW
    ) -> Iterator[tuple[int, Window]]:
        """The texts encoded window by window, with the number of each window's first text."""
        for first in range(0, len(texts), window):
            report = _shifted(progress, first, len(texts))
            yield first, self._engine.encode(texts[first : first + window], job, report, first)

    def encode_tokens(
        self, texts: Sequence[str], *, query: bool = False, progress: Progress | None = None
    ) -> TokenVectors:
        """A vector of length 1 for every token of every text: its last state. Special tokens and prompts are left out.

        Longer texts than the model takes are read in pieces, and no token is lost. Runs on torch in any case.

        Args:
            texts: what to encode.
            query: whether these are questions, which have a prompt of their own in some folders.
            progress: called with texts done and texts in all.
        """
        named = [self.prompts[name] for name in ("document", "passage", "corpus") if name in self.prompts]
        asked = self.prompts.get("query") if query else (named[0] if named else None)
        prompt = self._engine.prompt(asked)
        return token_vectors(_strings(texts), prompt, self._engine.tokenizer, self._backends, progress)

    def encode_token_ids(
        self,
        ids: Sequence[Sequence[int]],
        *,
        heads: bool = False,
        normalize: bool | None = None,
        progress: Progress | None = None,
    ) -> Embeddings:
        """Encode sequences of token ids as they are: special tokens are the caller's to give.

        Args:
            ids: token ids of each text; an empty sequence has vectors of zeros.
            heads: whether to give per-head vectors too.
            normalize: whether dense vectors get length 1; ``None`` does as the folder says.
            progress: called with sequences done and sequences in all.

        Raises:
            InputError: a sequence longer than ``max_tokens``.
        """
        sequences = [np.asarray(each, dtype=np.int64) for each in ids]
        for number, sequence in enumerate(sequences):
            if len(sequence) > self.max_tokens:
                raise InputError(
                    f"sequence {number} has {len(sequence)} token ids; {self.name} takes {self.max_tokens}: "
                    "split it, or give the text to encode_chunks"
                )
        count = len(sequences)
        result = self._engine.run(sequences, heads, 0, _shifted(progress, 0, count), count, count)
        self._normalize(result.dense, normalize)
        return result

    def save(self, folder: str | Path) -> list[str]:
        """Save as a sentence-transformers folder, of its own modules wherever the pooling allows; needs it installed.

        Args:
            folder: where to.

        Returns:
            Names of poolers that are no stock module: none, and plain sentence-transformers opens the folder and
            encodes the same; else it needs Polyhead installed and ``trust_remote_code=True``.

        Raises:
            InputError: a model in a GGUF file. MissingExtraError: no sentence-transformers.
        """
        from polyhead.embed.saving import sentence_transformer

        model = sentence_transformer(self._recipe, self._facts)
        from polyhead.pooling.sentence import save

        return save(model, folder)

    def _normalize(self, dense: np.ndarray, normalize: bool | None) -> None:
        if self._recipe.normalizes if normalize is None else normalize:
            dense /= np.maximum(np.linalg.norm(dense, axis=-1, keepdims=True), 1e-12)


def _strings(texts: Sequence[str], first: int = 0) -> list[str]:
    if isinstance(texts, (str, bytes)):
        raise InputError("one string was given, expected several: put it in a list")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"text {first + number} is {type(text).__name__}, expected str")
    return list(texts)


def _shifted(progress: Progress | None, first: int, total: int | None) -> Progress | None:
    """A progress callback for a part of the work that begins at ``first``."""
    if progress is None:
        return None

    def report(done: int, _: int | None) -> None:
        progress(first + done, total)

    return report


def _say_long(long: int, count: int, on_long: OnLong) -> None:
    if long:
        what = "were split into chunks whose vectors are averaged" if on_long == "chunk" else "were cut"
        message = f"{long} of {count} texts are longer than the model takes at once (max_tokens) and {what}"
        warnings.warn(message, LongTextWarning, stacklevel=3)


def _expect(name: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise InputError(f"{name} = {given!r}, expected one of {', '.join(known)}")
