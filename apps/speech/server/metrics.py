"""What Prometheus scrapes of a speech service. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """The numbers of one service, which its event loop adds to."""

    def __init__(self, live: Callable[[], int], heard: Callable[[], float]) -> None:
        """Take what tells the number of live streams, and the seconds of audio that streams were heard."""
        self._live, self._heard = live, heard
        self._registry = CollectorRegistry()
        about = "Streams that have ended, by how: end, gone, unread or the code of an error"
        self._streams = Counter("kd_streams", about, ("ended",), registry=self._registry)
        about = "Requests and streams that were refused, by the code of the error"
        self._refusals = Counter("kd_refusals", about, ("code",), registry=self._registry)
        about = "Time from the audio (or stop) that made a segment final to its message"
        self._final = Histogram("kd_final_seconds", about, buckets=_SECONDS, registry=self._registry)
        self._uploaded = 0.0
        self._registry.register(self)

    def stream(self, ended: str) -> None:
        """Count a stream that has ended."""
        self._streams.labels(ended).inc()

    def refusal(self, code: str) -> None:
        """Count a refusal."""
        self._refusals.labels(code).inc()

    def final(self, seconds: float) -> None:
        """Note how long a final message took."""
        self._final.observe(seconds)

    def upload(self, seconds: float) -> None:
        """Count the audio of a file."""
        self._uploaded += seconds

    def text(self) -> tuple[bytes, str]:
        """Return what Prometheus reads, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Any]:
        """Yield what is looked up when it is asked for, as prometheus_client collects it."""
        yield GaugeMetricFamily("kd_streams_live", "Streams that are heard now", value=self._live())
        audio = CounterMetricFamily("kd_audio_seconds", "Seconds of audio that were heard", labels=("endpoint",))
        audio.add_metric(("/v1/listen",), self._heard())
        audio.add_metric(("/v1/audio/transcriptions",), self._uploaded)
        yield audio
