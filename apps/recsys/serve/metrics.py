"""What Prometheus scrapes: counters and latency histograms, summed over the workers of one service.

A worker counts in plain numbers and leaves them in a file now and then; whoever is asked for /metrics adds them up.
(prometheus_client's own way for several processes takes a tenth of what a request may cost.)
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdcore.run import read_json

_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# name -> what it is, its labels, the bounds of a histogram or None for a counter
_METRICS: dict[str, tuple[str, tuple[str, ...], tuple[float, ...] | None]] = {
    "kd_requests": ("Requests by answer", ("endpoint", "status"), None),
    "kd_request_seconds": ("Time from a request's headers to its answer", ("endpoint", "index"), _SECONDS),
    "kd_reloads": ("Reloads by result", ("result",), None),
    "kd_events_stored": ("Events stored", (), None),
    "kd_shadow_seconds": ("Time of the shadow model", (), _SECONDS),
    "kd_shadow_overlap": ("Share of the answer that the shadow model has too", (), _SHARES),
    "kd_shadow_dropped": ("Requests that the shadow model had no time for, or could not answer", (), None),
}
_MODEL = ("version", "label", "index")


class Metrics:
    """The numbers of one worker; ``text`` has those of all."""

    def __init__(self, folder: Path) -> None:
        """Take the folder that the workers of one service share."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._file = folder, folder / f"{os.getpid()}.json"
        # (name, label values) -> value of a counter; bucket counts, number and sum of a histogram
        self._counters: dict[tuple[str, ...], float] = {}
        self._histograms: dict[tuple[str, ...], list[float]] = {}
        self._model: list[str] | None = None
        self._changed = True

    def request(self, endpoint: str, status: int, index: str, seconds: float) -> None:
        """Count one request."""
        self.count("kd_requests", endpoint, str(status))
        self.observe("kd_request_seconds", seconds, endpoint, index)

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter."""
        key = (name, *labels)
        self._counters[key] = self._counters.get(key, 0) + by
        self._changed = True

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add a value to a histogram."""
        key = (name, *labels)
        row = self._histograms.get(key)
        if row is None:
            row = self._histograms[key] = [0.0] * (len(_METRICS[name][2] or ()) + 2)
        row[bisect.bisect_left(_METRICS[name][2] or (), value)] += 1  # the last bucket but one has no bound
        row[-1] += value
        self._changed = True

    def model(self, version: str, label: str, index: str) -> None:
        """Say which model answers now."""
        self._model, self._changed = [version, label, index], True

    def save(self) -> None:
        """Leave the numbers for whichever worker is asked, if there are new ones."""
        if self._changed:
            self._changed = False
            self._write()

    def leave(self) -> None:
        """Leave the counts and no longer count as a worker."""
        self._model = None
        self._write()

    def _write(self) -> None:
        """Write the file whole, without waiting for the disk: it need not outlive the service."""
        temporary = self._file.with_suffix(".new")
        temporary.write_text(json.dumps(self._numbers()), encoding="utf-8")
        os.replace(temporary, self._file)

    def text(self) -> tuple[bytes, str]:
        """Return what Prometheus reads, over all workers, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

        said = [self._numbers()]
        for file in self._folder.glob("*.json"):
            if file != self._file:
                with suppress(OSError, ValueError):
                    said.append(read_json(file))
        registry = CollectorRegistry()
        registry.register(_Sum(said))
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def _numbers(self) -> dict[str, Any]:
        # the shadow counts in a thread of its own: what is iterated over is copied first
        return {
            "pid": os.getpid(),
            "model": self._model,
            "counters": [[list(key), value] for key, value in list(self._counters.items())],
            "histograms": [[list(key), row] for key, row in list(self._histograms.items())],
        }


class _Sum:
    """The sum of what some workers said, as prometheus_client collects it."""

    def __init__(self, said: Iterable[dict[str, Any]]) -> None:
        self._said = list(said)

    def collect(self) -> Iterator[Any]:
        """Yield every metric, those that nothing was counted of as well."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        counters = self._added("counters", lambda a, b: a + b)
        histograms = self._added("histograms", lambda a, b: [x + y for x, y in zip(a, b, strict=True)])
        for name, (about, labels, bounds) in _METRICS.items():
            if bounds is None:
                counter = CounterMetricFamily(name, about, labels=labels)
                found = {key: value for key, value in counters.items() if key[0] == name}
                for key, value in (found or ({(name,): 0.0} if not labels else {})).items():
                    counter.add_metric(key[1:], value)
                yield counter
            else:
                histogram = HistogramMetricFamily(name, about, labels=labels)
                rows = {key: row for key, row in histograms.items() if key[0] == name}
                for key, row in (rows or ({(name,): [0.0] * (len(bounds) + 2)} if not labels else {})).items():
                    names = [*map(str, bounds), "+Inf"]
                    buckets = list(zip(names, itertools.accumulate(row[:-1]), strict=True))
                    histogram.add_metric(key[1:], buckets, row[-1])
                yield histogram
        alive = [each for each in self._said if each["model"] is not None and _lives(each["pid"])]
        workers = GaugeMetricFamily("kd_workers", "Workers that answer", value=len(alive))
        model = GaugeMetricFamily("kd_model_info", "1 for a model that answers", labels=_MODEL)
        for labels in sorted({tuple(each["model"]) for each in alive}):
            model.add_metric(labels, 1)
        yield from (workers, model)

    def _added(self, kind: str, add: Any) -> dict[tuple[str, ...], Any]:
        total: dict[tuple[str, ...], Any] = {}
        for each in self._said:
            for key, value in each[kind]:
                name = tuple(key)
                total[name] = add(total[name], value) if name in total else value
        return total


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
