"""Encoding with OpenVINO on a CPU: exported once, heads and pooling in the graph; torch is not needed."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polyhead.embed.batching import Batch
from polyhead.errors import MissingExtraError

if TYPE_CHECKING:
    from polyhead.embed.graph import EncoderGraph
    from polyhead.embed.torch_backend import Sink

__all__ = ["OpenVINOBackend", "export_graph"]

_MODEL = "model.xml"


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Keep OpenVINO from reporting imports and exports: it does so over the network, from processes that it forks."""
    try:
        from openvino_telemetry.utils.sender import TelemetrySender
    except ImportError:
        yield
        return
    send = TelemetrySender.send
    TelemetrySender.send = lambda *_: None
    try:
        yield
    finally:
        TelemetrySender.send = send


def _openvino() -> Any:
    try:
        with _without_telemetry():
            import openvino
    except ImportError as error:
        raise MissingExtraError(
            "backend 'openvino' needs the package openvino: pip install 'polyhead[openvino]', or use backend='torch'"
        ) from error
    return openvino


def export_graph(graph: EncoderGraph, folder: Path) -> None:
    """Write a graph as OpenVINO files; its weights stay float32, as the precision is chosen when it is compiled.

    Args:
        graph: on the CPU, in float32.
        folder: an existing folder.
    """
    import torch

    openvino = _openvino()
    # Two rows, one of them padded, so that tracing keeps the mask and both sizes.
    ids = torch.full((2, 16), 5)
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    graph.with_heads = True
    with torch.no_grad(), warnings.catch_warnings(), _without_telemetry():
        # Tracing warns of each size it meets in Python; the parity check shows whether one was kept by mistake.
        warnings.simplefilter("ignore")
        model = openvino.convert_model(graph, example_input=(ids, mask, torch.tensor(0)))
    for given, name in zip(model.inputs, ("input_ids", "attention_mask", "skip"), strict=True):
        given.get_node().set_friendly_name(name)
        given.get_tensor().set_names({name})
    openvino.save_model(model, folder / _MODEL, compress_to_fp16=False)


class OpenVINOBackend:
    """Runs an exported graph, several batches at a time.

    Args:
        folder: what :func:`export_graph` wrote.
        precision: "fp32" or "bf16".
    """

    name = "openvino"

    def __init__(self, folder: Path, precision: str) -> None:
        openvino = _openvino()
        self.precision = precision
        self._compiled = openvino.Core().compile_model(
            folder / _MODEL,
            "CPU",
            {
                "PERFORMANCE_HINT": "THROUGHPUT",
                "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
            },
        )
        self._streams = int(self._compiled.get_property("NUM_STREAMS"))

    def budget(self, tokens: int) -> int:
        """Tokens a batch, where so many are to be encoded in all."""
        # Small batches stay in the processor's caches, and little work is shared out among the streams.
        return min(2048, max(256, -(-tokens // self._streams)))

    def run(self, batches: Iterable[Batch], heads: bool, skip: int, sink: Sink) -> None:
        """Encode batches and give each to ``sink`` with dense ``[batch, dim]`` and heads or ``None``.

        Args:
            batches: what to encode.
            heads: whether heads are wanted.
            skip: tokens at the start of each text that are not pooled.
            sink: takes each finished batch.
        """
        # No callbacks: OpenVINO calls them in its own threads, and a compiled model that is freed waits for these with
        # Python's lock held, so that the two can wait for each other for ever.
        requests = [self._compiled.create_infer_request() for _ in range(2 * self._streams)]
        running: deque[tuple[Any, Batch]] = deque()
        skipped = np.asarray(skip, dtype=np.int64)

        def finish() -> None:
            request, batch = running.popleft()
            request.wait()
            # The request's memory is used again for the next batch.
            found = [request.get_output_tensor(index).data.copy() for index in range(2 if heads else 1)]
            requests.append(request)
            sink(batch, found[0], found[1] if heads else None)

        try:
            for batch in batches:
                if not requests:
                    finish()
                request = requests.pop()
                inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "skip": skipped}
                request.start_async(inputs, share_inputs=True)
                running.append((request, batch))
            while running:
                finish()
        finally:
            # Also on Ctrl-C: the requests in work must not outlive the memory they read.
            for request, _ in running:
                request.wait()
