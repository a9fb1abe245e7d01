"""Counts of several workers as one text that Prometheus' own parser reads."""

from __future__ import annotations

import json
import os

from prometheus_client.parser import text_string_to_metric_families

from apps.recsys.serve.metrics import Metrics


def samples(metrics):
    text, kind = metrics.text()
    assert kind.startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_counts_and_histograms_by_hand(tmp_path):
    metrics = Metrics(tmp_path)
    for seconds in (0.0001, 0.001, 0.0011, 9.0):
        metrics.request("/v1/recommend", 200, "exact", seconds)
    metrics.request("other", 404, "exact", 0.2)
    found = samples(metrics)
    labels = (("endpoint", "/v1/recommend"), ("index", "exact"))
    assert found["kd_requests_total", (("endpoint", "/v1/recommend"), ("status", "200"))] == 4
    assert found["kd_requests_total", (("endpoint", "other"), ("status", "404"))] == 1
    assert found["kd_request_seconds_count", labels] == 4
    assert abs(found["kd_request_seconds_sum", labels] - 9.0022) < 1e-9

    def bucket(bound):
        return found["kd_request_seconds_bucket", (*labels, ("le", bound))]

    # a value on a bound belongs below it
    assert [bucket(each) for each in ("0.0005", "0.001", "0.002", "5.0", "+Inf")] == [1, 2, 3, 3, 4]


def test_what_was_never_counted_is_there_as_zero(tmp_path):
    found = samples(Metrics(tmp_path))
    for name in ("kd_events_stored_total", "kd_shadow_dropped_total", "kd_shadow_overlap_count", "kd_workers"):
        assert found[name, ()] == 0


def test_workers_are_added_up_and_dead_ones_keep_their_counts(tmp_path):
    mine = Metrics(tmp_path)
    mine.model("v2", "mf-8", "exact")
    mine.count("kd_events_stored", by=3)
    mine.observe("kd_shadow_overlap", 0.5)
    mine.save()
    said = json.loads((tmp_path / f"{os.getpid()}.json").read_text())
    for name, pid, model in (
        ("dead", 2**22 + 1, ["v1", "mf-8", "exact"]),
        ("alive", os.getppid(), ["v2", "mf-8", "exact"]),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({**said, "pid": pid, "model": model}))
    (tmp_path / "torn.json").write_text('{"pid"')
    found = samples(mine)
    assert found["kd_events_stored_total", ()] == 9
    assert found["kd_shadow_overlap_count", ()] == 3
    assert found["kd_shadow_overlap_sum", ()] == 1.5
    assert found["kd_workers", ()] == 2
    models = [dict(labels)["version"] for (name, labels) in found if name == "kd_model_info"]
    assert models == ["v2"]
    mine.leave()
    assert samples(Metrics(tmp_path / "other"))["kd_workers", ()] == 0
