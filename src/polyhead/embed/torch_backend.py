"""Encoding with torch, on a CPU or an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from polyhead.embed.batching import Batch

if TYPE_CHECKING:
    from polyhead.embed.graph import EncoderGraph

__all__ = ["Sink", "TorchBackend"]

Sink: TypeAlias = Callable[[Batch, np.ndarray, "np.ndarray | None"], None]


class TorchBackend:
    """Runs an :class:`EncoderGraph` batch by batch.

    Args:
        graph: the graph, its model already on its device and in its precision.
        precision: "fp32" or "bf16", for people.
    """

    name = "torch"

    def __init__(self, graph: EncoderGraph, precision: str) -> None:
        self._graph = graph.eval()
        self._device = next(graph.parameters()).device
        self.precision = precision

    def budget(self, tokens: int) -> int:
        """Tokens a batch, where so many are to be encoded in all."""
        # Accelerators want work for thousands of cores; on a CPU the caches decide.
        return 2048 if self._device.type == "cpu" else 32768

    def run(self, batches: Iterable[Batch], heads: bool, skip: int, sink: Sink) -> None:
        """Encode batches and give each to ``sink`` with dense ``[batch, dim]`` and heads or ``None``.

        Args:
            batches: what to encode.
            heads: whether heads are wanted.
            skip: tokens at the start of each text that are not pooled.
            sink: takes each finished batch.
        """
        for batch in batches:
            ids = torch.from_numpy(batch.ids).to(self._device)
            mask = torch.from_numpy(batch.mask).to(self._device)
            self._graph.with_heads = heads
            with torch.inference_mode():
                result = self._graph(ids, mask, skip)
            if heads:
                sink(batch, result[0].cpu().numpy(), result[1].cpu().numpy())
            else:
                sink(batch, result.cpu().numpy(), None)
