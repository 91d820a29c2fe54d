"""Encoding with OpenVINO on a CPU: exported once, heads and pooling in the graph; torch is not needed."""

from __future__ import annotations

from collections.abc import Iterable
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


def _openvino() -> Any:
    try:
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
    with torch.no_grad():
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
    # Small batches stay in the processor's caches; several of them run side by side.
    token_budget = 2048

    def __init__(self, folder: Path, precision: str) -> None:
        openvino = _openvino()
        self.precision = precision
        self._queue_of = openvino.AsyncInferQueue
        self._compiled = openvino.Core().compile_model(
            folder / _MODEL,
            "CPU",
            {
                "PERFORMANCE_HINT": "THROUGHPUT",
                "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
            },
        )

    def run(self, batches: Iterable[Batch], heads: bool, skip: int, sink: Sink) -> None:
        """Encode batches and give each to ``sink`` with dense ``[batch, dim]`` and heads or ``None``.

        Args:
            batches: what to encode.
            heads: whether heads are wanted.
            skip: tokens at the start of each text that are not pooled.
            sink: takes each finished batch, in any order, one at a time.
        """
        finished: list[tuple[Batch, np.ndarray, np.ndarray | None]] = []

        def keep(request: Any, batch: Batch) -> None:
            # The request's memory is used again for the next batch.
            dense = request.get_output_tensor(0).data.copy()
            finished.append((batch, dense, request.get_output_tensor(1).data.copy() if heads else None))

        def drain() -> None:
            while finished:
                sink(*finished.pop(0))

        queue = self._queue_of(self._compiled)
        queue.set_callback(keep)
        skipped = np.asarray(skip, dtype=np.int64)
        try:
            for batch in batches:
                inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "skip": skipped}
                queue.start_async(inputs, batch)
                drain()
        finally:
            # Also on Ctrl-C: the requests in work must not outlive the memory they read.
            queue.wait_all()
        drain()
