from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import numpy as np
import pytest

from polyhead.serve.batching import Batcher, BusyError, ClosedError, Options, SharedEncoder
from tests.serve.conftest import ServedEncoder


class GatedEncoder(ServedEncoder):
    """Waits in its first pass until told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def encode(self, texts, **options):  # type: ignore[no-untyped-def]
        self.begun.set()
        assert self.go.wait(20)
        return super().encode(texts, **options)


def held(**options: int) -> tuple[GatedEncoder, Batcher]:
    encoder = GatedEncoder()
    batcher = Batcher(encoder, **options)  # type: ignore[arg-type]
    batcher.submit(["first"])
    assert encoder.begun.wait(20)
    return encoder, batcher


def test_requests_that_arrive_during_a_pass_share_the_next() -> None:
    encoder, batcher = held()
    futures = [batcher.submit([f"text {i}", f"other {i}"]) for i in range(5)]
    encoder.go.set()
    for i, future in enumerate(futures):
        expected, _ = encoder._embed([f"text {i}", f"other {i}"], False)
        assert np.array_equal(future.result(20).dense, expected)
    batcher.close()
    assert encoder.passes == [1, 10]


def test_only_equal_options_share_a_pass_and_the_oldest_goes_first() -> None:
    encoder, batcher = held()
    plain = [batcher.submit(["a"]), batcher.submit(["b"], Options(heads=True)), batcher.submit(["c"])]
    encoder.go.set()
    found = [future.result(20) for future in plain]
    batcher.close()
    assert encoder.passes == [1, 2, 1]
    assert found[0].heads is None
    assert found[1].heads is not None
    assert found[1].heads.shape == (1, 2, 3, 4)


def test_large_requests_are_cut_and_joined_in_order() -> None:
    encoder, batcher = held(texts_at_once=4)
    texts = [f"number {i}" for i in range(10)]
    large, small = batcher.submit(texts, Options(heads=True)), batcher.submit(["small"], Options(heads=True))
    encoder.go.set()
    assert np.array_equal(large.result(20).dense, encoder._embed(texts, False)[0])
    assert large.result().heads.shape[0] == 10  # type: ignore[union-attr]
    assert small.result(20).dense.shape == (1, 24)
    batcher.close()
    assert max(encoder.passes) == 4


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    encoder, batcher = held(most_waiting=3)
    waiting = batcher.submit(["a", "b"])
    with pytest.raises(BusyError, match="at most 3 may") as refused:
        batcher.submit(["c", "d"])
    assert refused.value.retry_after > 0
    assert batcher.waiting == 2
    encoder.go.set()
    assert len(waiting.result(20)) == 2
    batcher.close()


def test_a_failing_request_does_not_fail_those_beside_it() -> None:
    encoder, batcher = held()
    good, bad, other = batcher.submit(["good"]), batcher.submit(["poison"]), batcher.submit(["other"])
    encoder.go.set()
    assert len(good.result(20)) == len(other.result(20)) == 1
    with pytest.raises(RuntimeError, match="poison"):
        bad.result(20)
    batcher.close()


def test_cancelled_work_is_not_done() -> None:
    encoder, batcher = held(texts_at_once=2)
    gone, stays = batcher.submit(["gone"]), batcher.submit(["stays"])
    assert gone.cancel()
    encoder.go.set()
    assert len(stays.result(20)) == 1
    with pytest.raises(CancelledError):
        gone.result()
    batcher.close()
    assert encoder.passes == [1, 1]


def test_closing_finishes_what_waits_and_takes_no_more() -> None:
    encoder, batcher = held()
    last = batcher.submit(["last"])
    closing = threading.Thread(target=batcher.close)
    closing.start()
    encoder.go.set()
    closing.join(20)
    assert len(last.result(0)) == 1
    with pytest.raises(ClosedError):
        batcher.submit(["late"])


def test_shared_encoder_gives_what_the_encoder_gives() -> None:
    encoder = ServedEncoder()
    batcher = Batcher(encoder)  # type: ignore[arg-type]
    shared = SharedEncoder(batcher)
    texts = [" ".join(f"word{i * j}" for j in range(30)) for i in range(70)]
    ours, theirs = shared.encode_chunks(texts, heads=True), encoder.encode_chunks(texts, heads=True)
    for name in ("dense", "heads", "owner", "start", "end"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    query = shared.encode_query(["one", "two"], heads=True)
    assert np.array_equal(query.heads, encoder.encode_query(["one", "two"], heads=True).heads)
    assert shared.fingerprint == encoder.fingerprint
    assert batcher.call(lambda: batcher.call(lambda: 5)) == 5
    batcher.close()
