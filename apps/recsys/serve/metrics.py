"""What Prometheus scrapes: counters and latency histograms, summed over the workers of one service."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def share_metrics(folder: Path) -> None:
    """Keep the metrics of all workers in ``folder``; to be called before prometheus_client is imported."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)


def forget_worker(pid: int) -> None:
    """Take a worker that died out of the gauges; what it counted stays counted."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(pid)


class Metrics:
    """The service's metrics; children are looked up once, since a label look-up costs as much as the count."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        registry = CollectorRegistry()  # every service has its own: a process that tests two must not mix them
        self._seconds = Histogram(
            "kd_request_seconds",
            "Time from the first byte of a request's headers to its answer",
            ["endpoint", "index"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._requests = Counter("kd_requests", "Requests by answer", ["endpoint", "status"], registry=registry)
        self.reloads = Counter("kd_reloads", "Reloads by result", ["result"], registry=registry)
        self.events = Counter("kd_events_stored", "Events stored", registry=registry)
        self.shadow_seconds = Histogram(
            "kd_shadow_seconds", "Time of the shadow model", buckets=_SECONDS, registry=registry
        )
        self.shadow_overlap = Histogram(
            "kd_shadow_overlap", "Share of the answer that the shadow model has too", buckets=_SHARES, registry=registry
        )
        self.shadow_dropped = Counter(
            "kd_shadow_dropped", "Requests the shadow model had no time for", registry=registry
        )
        self._model = Gauge(
            "kd_model_info",
            "1 for the model that answers",
            ["version", "label", "index"],
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.workers = Gauge("kd_workers", "Workers that answer", multiprocess_mode="livesum", registry=registry)
        self._children: dict[tuple[str, int, str], tuple[Any, Any]] = {}

    def request(self, endpoint: str, status: int, index: str, seconds: float) -> None:
        """Count one request."""
        key = endpoint, status, index
        children = self._children.get(key)
        if children is None:
            children = self._children[key] = (
                self._requests.labels(endpoint, str(status)),
                self._seconds.labels(endpoint, index),
            )
        children[0].inc()
        children[1].observe(seconds)

    def model(self, version: str, label: str, index: str, previous: tuple[str, str, str] | None) -> None:
        """Say which model answers now."""
        if previous is not None and previous != (version, label, index):
            self._model.labels(*previous).set(0)
        self._model.labels(version, label, index).set(1)

    @staticmethod
    def text() -> tuple[bytes, str]:
        """Return what Prometheus reads, over all workers, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, multiprocess

        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry), CONTENT_TYPE_LATEST
