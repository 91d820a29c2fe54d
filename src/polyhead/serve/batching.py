"""Dynamic batching: requests that arrive while the engine is busy share its next forward pass."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from polyhead.embed import Embeddings
from polyhead.errors import PolyheadError

if TYPE_CHECKING:
    from polyhead.embed import Encoder

__all__ = ["Batcher", "BusyError", "ClosedError", "Options", "SharedEncoder"]


class BusyError(PolyheadError):
    """The queue is full. ``retry_after`` is in seconds: about when there is room for what was asked."""

    def __init__(self, waiting: int, most: int, retry_after: float) -> None:
        super().__init__(
            f"{waiting:,} texts are waiting to be encoded, and at most {most:,} may; "
            f"ask again in about {max(1, round(retry_after))} s, or for less at once."
        )
        self.retry_after = retry_after


class ClosedError(PolyheadError):
    """The service is shutting down and takes no more work."""


class Options(NamedTuple):
    """What must be equal for two requests to share a forward pass."""

    ids: bool = False
    heads: bool = False
    prompt: str | None = None
    normalize: bool | None = None


@dataclass
class _Work:
    options: Options
    inputs: Sequence[Any]
    future: Future[Any] = field(default_factory=Future)
    call: Callable[[], Any] | None = None


class Batcher:
    """Owns an encoder and the one thread that uses it; takes work from any thread.

    While a forward pass runs, what arrives waits; the next pass takes the oldest request and every later one with the
    same options, up to ``texts_at_once``. So a lone request waits for nobody, and many share the work: there is no
    timer to tune. A request larger than a pass is cut, so that small ones come between.

    Args:
        encoder: does the work.
        texts_at_once: most texts of one pass.
        most_waiting: most texts that may wait; what would pass that is refused with :class:`BusyError`.
        observe: called after each pass with its texts, its requests and its seconds.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        texts_at_once: int = 256,
        most_waiting: int = 4096,
        observe: Callable[[int, int, float], None] = lambda texts, requests, seconds: None,
    ) -> None:
        self.encoder = encoder
        self.texts_at_once = texts_at_once
        self.most_waiting = most_waiting
        self._observe = observe
        self._queue: deque[_Work] = deque()
        self._waiting = 0
        self._rate = 100.0  # texts a second, as lately seen
        self._closed = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="polyhead-encoder", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return self._waiting

    def submit(self, inputs: Sequence[Any], options: Options | None = None) -> Future[Embeddings]:
        """Encode texts (or sequences of token ids, see :class:`Options`), in their order, sooner or later.

        Cancelling the future takes what has not begun out of the queue.

        Raises:
            BusyError: the queue has no room. ClosedError: after :meth:`close`.
        """
        options = options or Options()
        pieces = [inputs[i : i + self.texts_at_once] for i in range(0, len(inputs), self.texts_at_once)] or [inputs]
        works = [_Work(options, piece) for piece in pieces]
        self._put(works, len(inputs))
        return works[0].future if len(works) == 1 else _joined([work.future for work in works])

    def call(self, function: Callable[[], Any]) -> Any:
        """Run ``function`` in the encoder's thread, between passes, and give what it returns; waits for it."""
        if threading.current_thread() is self._thread:
            return function()
        work = _Work(Options(), (), call=function)
        self._put([work], 0)
        return work.future.result()

    def close(self) -> None:
        """Take no more work, finish what is waiting, and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        self._thread.join()

    def _put(self, works: list[_Work], texts: int) -> None:
        with self._wake:
            if self._closed:
                raise ClosedError("The service is shutting down; ask again when it is back.")
            if self._waiting and self._waiting + texts > self.most_waiting:
                raise BusyError(self._waiting, self.most_waiting, self._waiting / self._rate)
            self._queue.extend(works)
            self._waiting += texts
            self._wake.notify_all()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._queue and not self._closed:
                    self._wake.wait()
                if not self._queue:
                    return
                batch = self._take()
            if batch:
                self._run(batch)

    def _take(self) -> list[_Work]:
        """The oldest request, and what may go with it."""
        first = self._queue.popleft()
        batch, texts = [first], len(first.inputs)
        if first.call is None:
            rest: deque[_Work] = deque()
            for work in self._queue:
                fits = texts + len(work.inputs) <= self.texts_at_once
                if work.call is None and work.options == first.options and fits:
                    batch.append(work)
                    texts += len(work.inputs)
                else:
                    rest.append(work)
            self._queue = rest
        self._waiting -= texts
        return [work for work in batch if work.future.set_running_or_notify_cancel()]

    def _run(self, batch: list[_Work]) -> None:
        if batch[0].call is not None:
            _settle(batch[0].future, batch[0].call)
            return
        inputs = [each for work in batch for each in work.inputs]
        started = time.perf_counter()
        try:
            found = self._encode(inputs, batch[0].options)
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            for work in batch:  # one of them is at fault: the others must not pay for it
                _settle(work.future, lambda work=work: self._encode(work.inputs, work.options))  # type: ignore[misc]
            return
        seconds = time.perf_counter() - started
        self._rate = 0.8 * self._rate + 0.2 * len(inputs) / max(seconds, 1e-6)
        self._observe(len(inputs), len(batch), seconds)
        first = 0
        for work in batch:
            part = slice(first, first + len(work.inputs))
            work.future.set_result(Embeddings(found.dense[part], None if found.heads is None else found.heads[part]))
            first = part.stop

    def _encode(self, inputs: Sequence[Any], options: Options) -> Embeddings:
        if options.ids:
            return self.encoder.encode_token_ids(inputs, heads=options.heads, normalize=options.normalize)
        return self.encoder.encode(inputs, heads=options.heads, prompt=options.prompt, normalize=options.normalize)


class SharedEncoder:
    """An encoder whose work goes through a :class:`Batcher`: searches and updates share passes with other requests.

    It has the methods of :class:`polyhead.embed.Encoder` that indexes and searches use; all else is the encoder's.

    Args:
        batcher: does the work; its thread must not be the caller's.
    """

    PIECES_AT_ONCE = 64

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._encoder = batcher.encoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode_query(self, texts: Sequence[str], *, heads: bool = False) -> Embeddings:
        """See :meth:`polyhead.embed.Encoder.encode_query`."""
        options = Options(heads=heads, prompt=self._encoder.prompts.get("query"))
        return self._batcher.submit(list(texts), options).result()

    def encode_chunks(self, texts: Sequence[str], **options: Any) -> Any:
        """See :meth:`polyhead.embed.Encoder.encode_chunks`; other requests come between its batches."""
        from polyhead.embed import ChunkEmbeddings

        parts: list[ChunkEmbeddings] = []
        for first in range(0, max(1, len(texts)), self.PIECES_AT_ONCE):
            some = texts[first : first + self.PIECES_AT_ONCE]
            part = self._batcher.call(lambda some=some: self._encoder.encode_chunks(some, **options))  # type: ignore[misc]
            part.owner += first
            parts.append(part)
        heads = [part.heads for part in parts if part.heads is not None]
        columns = [np.concatenate([getattr(part, name) for part in parts]) for name in ("owner", "start", "end")]
        dense = np.concatenate([part.dense for part in parts])
        return ChunkEmbeddings(dense, np.concatenate(heads) if heads else None, *columns)

    def encode_tokens(self, texts: Sequence[str], **options: Any) -> Any:
        """See :meth:`polyhead.embed.Encoder.encode_tokens`."""
        return self._batcher.call(lambda: self._encoder.encode_tokens(texts, **options))


def _settle(future: Future[Any], function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)


def _joined(futures: list[Future[Embeddings]]) -> Future[Embeddings]:
    """One future of several, whose parts follow each other; cancelling it cancels those that have not begun."""
    whole: Future[Embeddings] = Future()
    left = threading.Semaphore(len(futures) - 1)

    def done(part: Future[Embeddings]) -> None:
        if whole.cancelled():
            for each in futures:
                each.cancel()
        if left.acquire(blocking=False):
            return
        if not whole.set_running_or_notify_cancel():
            return
        try:
            found = [each.result() for each in futures]
        except BaseException as error:
            whole.set_exception(error)
            return
        heads = [each.heads for each in found if each.heads is not None]
        dense = np.concatenate([each.dense for each in found])
        whole.set_result(Embeddings(dense, np.concatenate(heads) if heads else None))

    for each in futures:
        each.add_done_callback(done)
    return whole
