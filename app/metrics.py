"""What Prometheus reads: requests as they are counted here, jobs and queues as the database has them at the scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from app.contract.store import JobStore

# A worker that was not seen for this long counts as gone; it reports every few seconds.
WORKER_MAX_AGE_SECONDS = 30.0
# From a cached answer to the upload of a large model.
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class Metrics:
    """The metrics of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "tersor_http_requests", "Requests.", ("method", "route", "status"), registry=self.registry
        )
        self.latency = Histogram(
            "tersor_http_request_seconds",
            "Time from a request's head to the end of its answer.",
            ("method", "route"),
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.uploaded = Counter("tersor_upload_bytes", "Bytes of stored uploads.", ("kind",), registry=self.registry)

    def watch(self, store: JobStore) -> None:
        """Adds what the store counts."""
        self.registry.register(_StoreCounts(store))

    def text(self) -> bytes:
        """In Prometheus' text format; asks the database."""
        return generate_latest(self.registry)


class _StoreCounts(Collector):
    """Gauges read from the database at each scrape."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Nothing: the database need not answer when this is registered."""
        return iter(())

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Asks the database."""
        jobs = GaugeMetricFamily("tersor_jobs", "Jobs by state.", labels=("state",))
        for state, count in self._store.job_counts().items():
            jobs.add_metric((state.value,), count)
        yield jobs
        uploads = GaugeMetricFamily("tersor_uploads", "Uploads by kind and status.", labels=("kind", "status"))
        for (kind, status), count in self._store.upload_counts().items():
            uploads.add_metric((kind, status.value), count)
        yield uploads
        yield GaugeMetricFamily("tersor_queue_depth", "Work that waits for a worker.", value=self._store.queue_depth())
        alive = len(self._store.live_workers(WORKER_MAX_AGE_SECONDS))
        yield GaugeMetricFamily("tersor_live_workers", "Workers seen lately.", value=alive)
