"""The service under load: a real server on one core, its clients on another; every part is kept when it is done."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from apps.recsys import load_client
from apps.recsys.bench_index import judged, made_vectors
from apps.recsys.load_client import Load
from apps.recsys.load_server import Server
from kdcore import __version__
from kdcore.child_processes import environment, pinned
from kdcore.config import UserError
from kdcore.progress import Announcer
from kdcore.run import fingerprint, provenance, read_json, write_json

_K, _USERS, _SEEN = 10, 20_000, 50
_KINDS = ("exact", "int8", "hnsw", "ivfpq")
# what the targets were stated beside: an empty handler on that machine
_STATED_EMPTY = 15_000


# -- a made-up export -------------------------------------------------------------------------------------------------


def write_export(folder: Path, n_items: int, *, n_users: int = _USERS, dimension: int = 64, seed: int = 0) -> None:
    """Write an export as ``apps.recsys.export`` does, of a model that nobody trained; ``model.json`` comes last."""
    from apps.recsys.fold_in import fit_fold_in
    from apps.recsys.runtime import FORMAT

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    items, users = made_vectors(n_items, dimension, users=n_users, seed=seed)
    # few items have most interactions
    ranks = (n_items * generator.random((n_users, _SEEN)) ** 3).astype(np.int64)
    rows = [generator.permutation(np.unique(each)) for each in ranks]
    indptr = np.cumsum([0, *map(len, rows)])
    seen = generator.permutation(n_items).astype(np.int32)[np.concatenate(rows)]
    titles = [f"Made-up item {item}" for item in range(n_items)]
    for name, values in (("users", range(1, n_users + 1)), ("items", range(1, n_items + 1)), ("titles", titles)):
        (folder / f"{name}.json").write_text(json.dumps(list(values)), encoding="utf-8")
    save_file({"indptr": indptr, "items": seen}, folder / "seen.safetensors")
    some = min(n_users, 1000)
    weight, measured = fit_fold_in(users[:some], items, None, indptr[: some + 1], seen)
    tensors = {"user_vectors": users, "item_vectors": items, "fold_in": weight}
    save_file(tensors, folder / "vectors.safetensors")
    files = {}
    for file in sorted(each for each in folder.iterdir() if each.is_file() and each.name != "model.json"):
        with open(file, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        files[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
    about: dict[str, Any] = {
        "format": FORMAT,
        "model_version": fingerprint("made up", items, users, seen),
        **{"kind": "made_up", "label": f"made-up-{dimension}", "role": "student"},
        **{"users": n_users, "items": n_items, "dimension": dimension, "parameters": items.size + users.size},
        **{"input": "user_vector", "history_length": None, "seed": seed, "metrics": [], "segments": []},
        "data": {"name": "made up", "fingerprint": "", "interactions": len(seen), "simulated": True},
        "training": {"kdsuite": __version__, "recipe": None, "title": "made up for a benchmark, not trained"},
        **{"fold_in": measured, "parity": None, "files": files},
    }
    write_json(folder / "model.json", about)


# -- the parts --------------------------------------------------------------------------------------------------------


class Bench:
    """What the parts share: folders, cores, models that are made once, loads."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        cores = sorted(os.sched_getaffinity(0))
        self.server_cores = [cores[0]] if len(cores) > 1 else None
        self.client_cores = cores[1:2] if len(cores) > 1 else None
        self.announce = Announcer()
        self._ready: set[tuple[Path, str]] = set()

    def seconds(self, full: float) -> float:
        """Return how long to measure."""
        return max(full / 5, 1.0) if self.quick else full

    def model(self, n_items: int, index: str, *, seed: int = 0, n_users: int = _USERS) -> Path:
        """Return a made-up export, prepared and indexed."""
        folder = self.folder / "models" / f"{n_items}-{n_users}-{seed}"
        if not (folder / "model.json").exists():
            self.announce(f"making up a model of {n_items:,} items x 64")
            write_export(folder, n_items, n_users=n_users, seed=seed)
        if (folder, index) not in self._ready:  # in each run: the code that made an index may have changed since
            words = ["--model", str(folder), "--index", index, "--prepare-only"]
            subprocess.run([sys.executable, "-m", "apps.cli", "recsys", "serve", *words], check=True, env=environment())
            self._ready.add((folder, index))
        return folder

    def server(self, model: Path, index: str, *words: str, events: str = "") -> Server:
        """Start a server with its own new event store."""
        folder = Path(tempfile.mkdtemp(prefix="server-", dir=self.folder))
        store = events or str(folder / "events.db")
        words = ("--model", str(model), "--index", index, "--events", store, *words)
        return Server(words, folder, self.server_cores)

    def load(self, server: Server, load: Load) -> dict[str, Any]:
        """Drive a server with our client; say what processor time of the server a request took."""
        before, began = server.cpu_seconds(), time.perf_counter()
        report = load_client.drive(load, self.client_cores)
        used, passed = server.cpu_seconds() - before, time.perf_counter() - began
        per_request = 1e6 * used / max(report["requests"], 1)
        return {
            **report,
            "server_cpu_us_per_request": round(per_request, 1),
            "server_cpu_share": round(used / passed, 3),
        }

    def wrk(self, server: Server, connections: int, seconds: float) -> dict[str, Any] | None:
        """Drive a server with wrk, None if this machine has none."""
        if shutil.which("wrk") is None:
            return None
        script = self.folder / "recommend.lua"
        script.write_text(_LUA.replace("USERS", str(_USERS)).replace("K", str(_K), 1), encoding="utf-8")
        words = ["wrk", "-t1", "--timeout", "30s", f"-c{connections}", f"-d{max(round(seconds), 1)}s"]
        words += ["-s", str(script), f"http://127.0.0.1:{server.port}/v1/recommend"]
        with pinned(self.client_cores):
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        rate = report["requests"] / report.pop("seconds")
        return {"client": "wrk", "connections": connections, "requests_per_second": round(rate, 1), **report}


_LUA = """wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
request = function() return wrk.format(nil, nil, nil, '{"user_id":' .. math.random(1, USERS) .. ',"k":K}') end
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format('{"requests":%d,"seconds":%f,"latency_ms":{"p50":%.3f,"p95":%.3f,"p99":%.3f,"max":%.3f},' ..
    '"failed":%d}\\n', summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3,
    latency:percentile(95) / 1e3, latency:percentile(99) / 1e3, latency.max / 1e3,
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


def _asking(port: int, *, together: int = 0, **options: Any) -> Load:
    """Return the load of many users in turn; ``together``: lists of so many."""
    generator = random.Random(0)
    asked = [{"user_id": generator.randint(1, _USERS), "k": _K} for _ in range(20_000)]
    if together:
        lists = [asked[start : start + together] for start in range(0, len(asked) - together, together)]
        return Load(port, [json.dumps(each) for each in lists[:2000]], wanted=_K, sample=4, **options)
    return Load(port, [json.dumps(each) for each in asked], wanted=_K, **options)


def calibration(bench: Bench) -> dict[str, Any]:
    """Measure an empty handler and the client."""
    folder = Path(tempfile.mkdtemp(prefix="server-", dir=bench.folder))
    with Server([], folder, bench.server_cores, bare=True) as server:
        load = replace(_asking(server.port, seconds=bench.seconds(10)), wanted=None)
        bench.load(server, replace(load, seconds=1.0))
        row = bench.load(server, load)
        wrk = bench.wrk(server, 32, bench.seconds(10))
    capacity = round(1e6 / row["client_cpu_us_per_request"])
    ratio = row["requests_per_second"] / _STATED_EMPTY
    return {
        "rows": [row, wrk],
        "client_could_send_per_second": capacity,
        "of_the_machine_of_the_targets": round(ratio, 3),
    }


def throughput(bench: Bench) -> dict[str, Any]:
    """Ask the HNSW index of 100k items as fast as it answers."""
    model, rows = bench.model(100_000, "hnsw"), []
    for log in ("all", "errors"):
        with bench.server(model, "hnsw", "--log", log) as server:
            bench.load(server, _asking(server.port, requests=2_000))
            for connections in (16, 32, 64) if log == "all" else (32,):
                load = _asking(server.port, connections=connections, seconds=bench.seconds(10))
                rows.append({"log": log, **bench.load(server, load)})
                if (row := bench.wrk(server, connections, bench.seconds(10))) is not None:
                    rows.append({"log": log, **row})
    best = max((row for row in rows if row["log"] == "all"), key=lambda row: float(row["requests_per_second"]))
    figure = {**judged(best["requests_per_second"], 7_500, unit="requests/s"), "client": best["client"]}
    failed = judged(sum(row["failed"] for row in rows), 0, least=False)
    return {"figures": {"HNSW, 100k items, one core": figure, "failed requests at full load": failed}, "rows": rows}


def latency(bench: Bench) -> dict[str, Any]:
    """Ask at half the target rate, and at half of what this server can, by a schedule."""
    model = bench.model(100_000, "hnsw")
    with bench.server(model, "hnsw") as server:
        most = bench.load(server, _asking(server.port, seconds=bench.seconds(5)))["requests_per_second"]
        options: dict[str, Any] = {"connections": 64, "seconds": bench.seconds(30)}
        plans = [(3_750.0, "even"), (3_750.0, "poisson"), (float(round(most / 2)), "even")]
        rows = [
            bench.load(server, _asking(server.port, rate=rate, arrivals=arrivals, **options))
            for rate, arrivals in plans
        ]
    figure = judged(rows[0]["latency_ms"]["p99"], 3.0, least=False, unit="ms")
    return {"figures": {"p99 at 3,750 requests/s": figure}, "saturates_at": most, "rows": rows}


def exact(bench: Bench) -> dict[str, Any]:
    """Compare exact mode with faiss alone, in turn on the same core."""
    model, alone = bench.model(100_000, "exact"), []
    with bench.server(model, "exact") as server:
        alone.append(_flat(bench, model))
        bench.load(server, _asking(server.port, requests=500))
        row = bench.load(server, _asking(server.port, connections=32, seconds=bench.seconds(15)))
        alone.append(_flat(bench, model))
    ratio = row["requests_per_second"] / float(np.mean(alone))
    figure = judged(ratio, 0.9, unit="x faiss IndexFlatIP")
    return {"figures": {"exact, 100k items, one core": figure}, "faiss_per_second": alone, "rows": [row]}


def _flat(bench: Bench, model: Path) -> float:
    """Return how many queries a second faiss alone answers, one at a time, on the server's core."""
    words = ["flat", str(model), str(bench.seconds(5))]
    with pinned(bench.server_cores):
        command = [sys.executable, "-m", "apps.recsys.bench_serve", *words]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment())
    return float(done.stdout)


def memory(bench: Bench) -> dict[str, Any]:
    """Watch the server's memory over a million requests."""
    model, requests = bench.model(100_000, "hnsw"), 50_000 if bench.quick else 1_000_000
    with bench.server(model, "hnsw") as server:
        bench.load(server, _asking(server.port, requests=20_000))
        seen, failed = [server.memory()], 0
        for part in range(10):
            bench.announce(f"memory over {requests:,} requests: {part * requests // 10}/{requests}")
            failed += bench.load(server, _asking(server.port, requests=requests // 10))["failed"]
            seen.append(server.memory())
    growth = max(abs(each["rss"] / seen[0]["rss"] - 1) for each in seen[1:])
    figures = {
        f"growth of memory over {requests:,} requests": judged(100 * growth, 2.0, least=False, unit="%"),
        f"failed of {requests:,} requests": judged(failed, 0, least=False),
    }
    return {"figures": figures, "bytes": seen}


def reload(bench: Bench) -> dict[str, Any]:
    """Swap the model again and again while clients ask as fast as they are answered."""
    models = [bench.model(100_000, "hnsw", seed=seed).resolve() for seed in (0, 1)]
    folder = Path(tempfile.mkdtemp(prefix="reload-", dir=bench.folder))
    current, key = folder / "current", "k" * 32
    (folder / "admin.key").write_text(key, encoding="utf-8")
    current.symlink_to(models[0])
    times, answers, reloads = [], [], 10 if bench.quick else 50
    with bench.server(current, "hnsw", "--admin-key", str(folder / "admin.key")) as server:
        calm = bench.load(server, _asking(server.port, connections=16, seconds=bench.seconds(5)))
        driver = load_client.Driver(_asking(server.port, connections=16, sample=16), bench.client_cores)
        try:
            for number in range(1, reloads + 1):
                bench.announce(f"reloads: {number}/{reloads}")
                (folder / "next").symlink_to(models[number % 2])
                os.replace(folder / "next", current)
                began = time.perf_counter()
                answers.append(server.ask("/v1/reload", {}, {"authorization": f"Bearer {key}"}))
                times.append(time.perf_counter() - began)
            row = driver.finish()
        finally:
            driver.stop()
    changed = sum(status == 200 and answer["model_version"] != answer["previous_version"] for status, answer in answers)
    figures = {
        f"failed requests during {reloads} reloads": judged(row["failed"], 0, least=False),
        "reloads that changed the version": judged(changed, reloads),
    }
    seconds = {"p50": round(float(np.median(times)), 3), "max": round(max(times), 3)}
    return {"figures": figures, "reload_seconds": seconds, "rows": [{"during": "reloads", **row}, calm]}


def kinds(bench: Bench) -> dict[str, Any]:
    """Measure every index with single requests and with lists of them."""
    rows = []
    for kind in _KINDS:
        model = bench.model(100_000, kind)
        with bench.server(model, kind) as server:
            bench.load(server, _asking(server.port, requests=300))
            for together, connections in ((0, 32), (8, 8), (64, 4)):
                bench.announce(f"{kind}, lists of {together or 1}")
                load = _asking(server.port, together=together, connections=connections, seconds=bench.seconds(5))
                row = bench.load(server, load)
                answers = round(row["requests_per_second"] * (together or 1), 1)
                rows.append({"index": kind, "batch": together or 1, "recommendations_per_second": answers, **row})
    return {"rows": rows}


def million(bench: Bench) -> dict[str, Any]:
    """Measure the start and the memory of a large model; ``quick``: of a tenth."""
    n = 100_000 if bench.quick else 1_000_000
    small, vectors, figures, rows = bench.model(2_000, "exact"), 4 * 64 * n, {}, []
    for kind in ("exact", "hnsw"):
        model = bench.model(n, kind)
        row: dict[str, Any] = {"index": kind, "items": n, "vectors_bytes": vectors}
        for workers in (1, 2):
            bench.announce(f"{n:,} items, {kind}, {workers} workers")
            with bench.server(small, "exact", "--workers", str(workers)) as server:
                bench.load(server, _asking(server.port, requests=500))
                floor = server.memory()
            with bench.server(model, kind, "--workers", str(workers)) as server:
                start = server.ready_seconds
                load = bench.load(server, _asking(server.port, requests=500 if kind == "exact" else 20_000))
                used = server.memory()
            row[f"workers_{workers}"] = {"ready_seconds": round(start, 3), "small_model": floor, "this_model": used}
            row[f"workers_{workers}"]["requests_per_second"] = load["requests_per_second"]
            times = (used["pss"] - floor["pss"]) / vectors
            name = f"memory of {n:,} items, {kind}, {workers} worker{'s' * (workers > 1)}"
            figures[name] = judged(times, 1.1, least=False, unit="x the vectors")
        figures[f"cold start, {n:,} items, {kind}"] = judged(
            row["workers_1"]["ready_seconds"], 2.0, least=False, unit="s"
        )
        rows.append(row)
    return {"figures": figures, "rows": rows}


def index(bench: Bench) -> dict[str, Any]:
    """Measure the indexes without a service."""
    from apps.recsys import bench_index

    sizes = ((100_000, 64),) if bench.quick else ((100_000, 64), (1_000_000, 64))
    result = bench_index.run(bench.folder / "index", sizes=sizes)
    return {"figures": bench_index.figures(result["rows"]), **result}


def events(bench: Bench) -> dict[str, Any]:
    """Store events one by one through HTTP and without it, and kill both."""
    from apps.recsys import bench_events

    model, kills = bench.model(2_000, "exact"), 5 if bench.quick else 20
    folder = Path(tempfile.mkdtemp(prefix="events-", dir=bench.folder))
    store = bench_events.throughput(folder / "store", connections=16, seconds=bench.seconds(5))
    generator = random.Random(0)
    bodies = [
        json.dumps({"events": [{"user_id": generator.randint(1, _USERS), "item_id": generator.randint(1, 2_000)}]})
        for _ in range(10_000)
    ]
    with bench.server(model, "exact", events=str(folder / "http.db")) as server:
        load = Load(server.port, bodies, path="/v1/events", connections=16, seconds=bench.seconds(10))
        row = bench.load(server, load)
    bench.announce(f"killing the store and the server {kills} times each")
    killed = bench_events.kill_rounds(folder / "killed", kills, seed=0)
    over_http = _kill_servers(bench, model, kills, str(folder / "killed.db"))
    figures = {
        "events a second over HTTP, 16 connections": judged(row["requests_per_second"], 2_000, unit="events/s"),
        f"acknowledged events lost in {kills} kills of the store": judged(killed["lost"], 0, least=False),
        f"acknowledged events lost in {kills} kills of the server": judged(over_http["lost"], 0, least=False),
    }
    return {"figures": figures, "store": store, "rows": [row], "kills": killed, "kills_over_http": over_http}


def _kill_servers(bench: Bench, model: Path, kills: int, store: str) -> dict[str, int]:
    """Kill a server while clients store events, at random moments; count what it acknowledged and what is there."""
    from apps.recsys.events import EventStore

    generator, numbers, acknowledged = random.Random(0), itertools.count(), []

    def told(request: bytes, status: int, body: bytes) -> None:
        if status == 200:
            acknowledged.append(json.loads(request.rpartition(b"\r\n\r\n")[2])["events"][0])

    for kill in range(kills):
        server = bench.server(model, "exact", events=store)
        load = Load(server.port, [], path="/v1/events", connections=16, seconds=1.5)

        def source(kill: int = kill, load: Load = load) -> bytes:
            event = {"user_id": f"kill-{kill}", "item_id": str(next(numbers))}
            return replace(load, bodies=[json.dumps({"events": [event]})]).wire()[0]

        timer = threading.Timer(generator.uniform(0.1, 1.0), server.kill)
        timer.start()
        load_client.run(load, source=source, told=told)
        timer.join()
    opened = EventStore(store)
    try:
        there = {user: opened.items_of(user, sys.maxsize) for user in {each["user_id"] for each in acknowledged}}
        stored, distinct = sum(map(len, there.values())), {user: set(items) for user, items in there.items()}
    finally:
        opened.close()
    lost = sum(each["item_id"] not in distinct[each["user_id"]] for each in acknowledged)
    repeated = stored - sum(map(len, distinct.values()))
    return {"kills": kills, "acknowledged": len(acknowledged), "stored": stored, "lost": lost, "repeated": repeated}


def page(bench: Bench) -> dict[str, Any]:
    """Measure the page in a real browser, on the demo's model if it was made."""
    from apps.recsys import bench_page

    demo = next((each for each in _DEMOS if (each / "model.json").exists()), None)
    model = demo or bench.model(2_000, "exact")
    with bench.server(model, "auto") as server:
        result = bench_page.first_answer(f"http://127.0.0.1:{server.port}/", rounds=5 if bench.quick else 20)
    if "skipped" in result:
        return result
    figure = judged(result["ms"]["max"], 300, least=False, unit="ms, the slowest")
    return {"figures": {"first answer of the page": figure}, "model": demo.name if demo else "made up", **result}


_DEMOS = (Path("runs/demo/recsys/exported"), Path("runs/ml-exported"))
PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    each.__name__: each
    for each in (calibration, throughput, latency, exact, memory, reload, kinds, index, million, events, page)
}


def run(work: Path, *, quick: bool = False, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure all parts, or some of them; what was measured before is kept in ``work`` and reported again.

    Raises UserError for a part that does not exist.
    """
    for name in only:
        if name not in PARTS:
            raise UserError(f"--only: unknown part {name!r}; wanted {', '.join(PARTS)}")
    bench = Bench(work / ("serve-quick" if quick else "serve"), quick)
    bench.folder.mkdir(parents=True, exist_ok=True)
    _tidy(bench.folder)
    for name in only or PARTS:
        file = bench.folder / f"{name}.json"
        if file.exists():
            bench.announce(f"{name}: measured before; delete {file} to measure it again")
            continue
        bench.announce(f"{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}")
        before, began = os.getloadavg(), time.perf_counter()
        result = PARTS[name](bench)
        passed = round(time.perf_counter() - began, 1)
        # of an average of 1, the part itself is about 1 to 2
        loads = {"before": [round(each, 2) for each in before], "after": [round(each, 2) for each in os.getloadavg()]}
        write_json(file, {**result, "seconds": passed, "machine_load": loads, "commit": provenance()["commit"]})
    parts = {
        name: read_json(bench.folder / f"{name}.json") for name in PARTS if (bench.folder / f"{name}.json").exists()
    }
    figures = {name: figure for part in parts.values() for name, figure in part.get("figures", {}).items()}
    if "calibration" in parts and "throughput" in parts:
        empty = parts["calibration"]["rows"][0]["requests_per_second"]
        ratio = max(row["requests_per_second"] for row in parts["throughput"]["rows"] if row["log"] == "all") / empty
        # the target on a machine of any speed
        figures["HNSW beside an empty handler"] = judged(ratio, 7_500 / _STATED_EMPTY, unit="x")
    return {
        "model": f"made up, not trained: clustered vectors of 64 dimensions, {_USERS:,} users of about {_SEEN} items",
        "quick": quick,
        "cores": {"server": bench.server_cores, "client": bench.client_cores},
        "figures": figures,
        "parts": parts,
    }


def _tidy(folder: Path) -> None:
    for what in ("server", "reload", "events"):
        for left in folder.glob(f"{what}-*"):
            shutil.rmtree(left, ignore_errors=True)


def _main(words: Sequence[str]) -> None:
    """Time faiss alone: ``flat MODEL SECONDS``."""
    import faiss
    from safetensors.numpy import load_file

    faiss.omp_set_num_threads(1)
    arrays = load_file(Path(words[1]) / "vectors.safetensors")
    flat = faiss.IndexFlatIP(arrays["item_vectors"].shape[1])
    flat.add(arrays["item_vectors"])
    search = partial(flat.search, k=_K)
    search(arrays["user_vectors"][:1])
    asked, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < float(words[2]):
        search(arrays["user_vectors"][asked % _USERS][None])
        asked += 1
    print(asked / passed)


if __name__ == "__main__":
    _main(sys.argv[1:])
