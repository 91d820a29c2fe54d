"""What the service does, apart from HTTP: one encoder, one index, shared by every request."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.errors import InputError
from polyhead.evaluate.vectors import unit
from polyhead.serve.batching import Batcher, Options, SharedEncoder
from polyhead.serve.limits import Limits
from polyhead.serve.metrics import Metrics

if TYPE_CHECKING:
    from polyhead.embed import Embeddings, Encoder
    from polyhead.search.engine import SearchResult
    from polyhead.search.index import Index, UpdateReport
    from polyhead.search.posted import Posted

__all__ = ["Service"]


class Service:
    """One encoder and, where given, one index.

    Args:
        encoder: encodes everything; one thread uses it.
        index: what is searched and changed; None serves embeddings and reranking alone.
        limits: bounds of requests.

    Raises:
        IndexMismatchError: the index exists and another encoder made it.
    """

    def __init__(self, encoder: Encoder, index: Index | None = None, *, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.index = index
        if index is not None and index.exists():
            index.check(encoder)
        self.batcher = Batcher(
            encoder,
            texts_at_once=self.limits.texts_at_once,
            most_waiting=self.limits.waiting,
            observe=self.metrics.observe_pass,
        )
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        self.encoder: Any = SharedEncoder(self.batcher)
        self._writer = threading.Lock()
        self.ready = False

    @property
    def model(self) -> str:
        """Name of the encoder."""
        return str(self.encoder.name)

    def warm(self) -> None:
        """Load the model, so that the first request does not wait for it."""
        self.batcher.submit(["ready"]).result()
        self.ready = True

    def close(self) -> None:
        """Finish what was accepted; take no more."""
        self.ready = False
        with self._writer:
            self.batcher.close()

    def embed(self, inputs: Sequence[Any], options: Options) -> Future[Embeddings]:
        """Vectors of texts or of sequences of token ids.

        Raises:
            InputError: a text longer than the limit. BusyError: no room in the queue.
        """
        if not options.ids:
            self._check_lengths(inputs)
        return self.batcher.submit(inputs, options)

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens of all texts, special ones included."""
        return sum(len(self.encoder.tokens(text)) for text in texts)

    def rerank(self, query: str, documents: Sequence[str], strategy: str) -> np.ndarray:
        """Relevance ``[documents]`` of each document to the question; waits, so not for an event loop's thread.

        Args:
            query: the question.
            documents: texts.
            strategy: "late": mean over the question's tokens of the best cosine with a token of the document;
                "dense": cosine of the two vectors; "both": the mean of the two. No negative ones are given.

        Raises:
            InputError: a text longer than the limit, or a question without a token.
        """
        from polyhead.search.late.scoring import maxsim

        self._check_lengths([query, *documents])
        scores = np.zeros(len(documents))
        if strategy in ("late", "both"):
            asked = self.encoder.encode_tokens([query], query=True).vectors
            if not len(asked):
                raise InputError("The query has no token to match; give one with words.")
            scores += maxsim(asked, self.encoder.encode_tokens(documents)) / len(asked)
        if strategy in ("dense", "both"):
            scores += self.encode_documents(documents) @ unit(self.encoder.encode_query([query]).dense)[0]
        if strategy == "both":
            scores /= 2
        return np.clip(np.nan_to_num(scores, neginf=0.0), 0.0, 1.0)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors ``[texts, dim]`` of length 1, as documents are encoded; waits, so not for an event loop's thread."""
        found = self.batcher.submit(list(texts), Options(prompt=self._document_prompt())).result().dense
        return unit(found)

    def search(self, query: str, *, k: int, strategy: str, where: str | None, language: str) -> SearchResult:
        """See :func:`polyhead.search.search_index`."""
        from polyhead.search.engine import search_index

        self._check_lengths([query])
        return search_index(
            self._existing(),
            query,
            self.encoder,
            k=k,
            by=strategy,
            where=where,
            language=language,
            update_tokens=False,
        )

    def change(self, documents: Sequence[Posted], remove: Sequence[str]) -> tuple[UpdateReport | None, int]:
        """Remove documents, then put others, one change at a time; committed when it returns.

        Returns:
            What putting did, and how many documents were removed.
        """
        index = self._given()
        self._check_lengths([document.text for document in documents])
        with self._writer:
            removed = index.remove(remove) if remove else 0
            return (index.put(documents, lambda: self.encoder) if documents else None), removed

    def chunks(self) -> int:
        """Rows of the index; 0 where there is none."""
        return self.index.store.count() if self.index is not None and self.index.exists() else 0

    def heads(self) -> dict[str, Any]:
        """The maps of this service's heads: the importance that the index measured, by layer and head."""
        layers, heads, head_dim = self.encoder.head_shape
        maps = []
        if self.index is not None and self.index.exists() and self.index.meta.head_importance is not None:
            maps.append(
                {
                    "name": "importance in this index",
                    "layers": list(self.encoder.head_layers),
                    "values": np.asarray(self.index.meta.head_importance, dtype=float).tolist(),
                    "data": f"{self.index.meta.sample_rows} chunks",
                }
            )
        return {"model": self.model, "layers": layers, "heads": heads, "head_dim": head_dim, "maps": maps}

    def _given(self) -> Index:
        if self.index is None:
            raise InputError("This service has no index; start it with --index DIR to search and to add documents.")
        return self.index

    def _existing(self) -> Index:
        index = self._given()
        if not index.exists():
            raise InputError(f"The index {index.uri} is empty; add documents with POST /index or `polyhead index`.")
        return index

    def _document_prompt(self) -> str | None:
        prompts = self.encoder.prompts
        return next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), None)

    def _check_lengths(self, texts: Sequence[str]) -> None:
        for number, text in enumerate(texts):
            if len(text) > self.limits.characters:
                raise InputError(
                    f"Text {number} has {len(text):,} characters; at most {self.limits.characters:,} are taken."
                )
