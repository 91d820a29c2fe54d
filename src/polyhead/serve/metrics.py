"""What the service counts, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["Metrics"]


class Metrics:
    """Counters of one service; each has a registry of its own, so that two services in a process do not mix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "polyhead_requests", "Requests answered.", ["route", "method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "polyhead_request_seconds", "Seconds from request to answer.", ["route"], registry=self.registry
        )
        self.texts = Counter("polyhead_texts", "Texts encoded.", registry=self.registry)
        self.passes = Counter("polyhead_passes", "Forward passes.", registry=self.registry)
        self.shared = Histogram(
            "polyhead_requests_in_a_pass",
            "Requests that shared a forward pass.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=self.registry,
        )
        self.waiting = Gauge("polyhead_texts_waiting", "Texts in the queue.", registry=self.registry)

    def observe_pass(self, texts: int, requests: int, seconds: float) -> None:
        """Count a forward pass."""
        self.texts.inc(texts)
        self.passes.inc()
        self.shared.observe(requests)

    def page(self) -> bytes:
        """All of it, as ``/metrics`` gives it."""
        return generate_latest(self.registry)
