"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        registry = self.registry
        self.requests = Counter(
            "gcfast_requests",
            "Requests answered, by path and status",
            ["path", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "gcfast_request_seconds",
            "From a request's first byte to the end of its answer",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "gcfast_batch_size",
            "Pictures that went through the model at once",
            buckets=_SIZES,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "gcfast_batch_seconds",
            "Time of a batch in the model, search and maps included",
            buckets=_SECONDS,
            registry=registry,
        )
        self.waiting = Gauge(
            "gcfast_queue", "Pictures that no batch has taken yet", registry=registry
        )
        self.in_flight = Gauge(
            "gcfast_in_flight", "Requests that are being answered", registry=registry
        )
        self.rows = Gauge("gcfast_database_rows", "Rows of the database in use", registry=registry)
        self.reloads = Counter(
            "gcfast_reloads",
            "Databases opened while serving, by result",
            ["result"],
            registry=registry,
        )

    def observe_batch(self, size: int, seconds: float) -> None:
        """Count a batch that has run."""
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def follow(
        self, waiting: Callable[[], int], in_flight: Callable[[], int], rows: Callable[[], int]
    ) -> None:
        """Ask these for their values whenever the metrics are read."""
        self.waiting.set_function(waiting)
        self.in_flight.set_function(in_flight)
        self.rows.set_function(rows)

    def text(self) -> bytes:
        """Return all of them in Prometheus' text format."""
        return generate_latest(self.registry)
