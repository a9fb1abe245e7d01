"""How fast, exact and big the indexes are on made-up vectors that look trained; each kind in a fresh process."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from apps.recsys.index import Filter, open_index, search_filtered
from kdcore.run import atomic_path, provenance

KINDS = ("exact", "int8", "hnsw", "ivfpq")
K = 10
EXCLUDED = 100
_TUNED = 300  # users that an index is tuned on
_HELD = 1000  # other users that it is measured on
_SCAN_SECONDS = 8.0  # for timing what takes long


def made_vectors(n: int, d: int, *, users: int = 500, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return item vectors float32 [n, d] and user vectors [users, d] with the traits of trained ones.

    Items lie in about sqrt(n) clusters of very different sizes, coordinates differ in scale, and norms are log-normal,
    as popularity is. A user is a mixture of three clusters with noise.
    """
    generator = np.random.default_rng(seed)
    clusters = max(8, int(n**0.5))
    spectrum = ((1 + np.arange(d)) ** -0.35).astype(np.float32)
    centres = generator.standard_normal((clusters, d), dtype=np.float32) * spectrum
    sizes = generator.dirichlet(np.full(clusters, 0.5))
    items = 0.6 * generator.standard_normal((n, d), dtype=np.float32) * spectrum
    items += centres[generator.choice(clusters, n, p=sizes)]
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    items *= np.exp(0.35 * generator.standard_normal((n, 1), dtype=np.float32))
    tastes = centres[generator.choice(clusters, (users, 3), p=sizes)]
    shares = generator.dirichlet(np.ones(3), users).astype(np.float32)
    noise = 0.4 * generator.standard_normal((users, d), dtype=np.float32) * spectrum
    return items, np.einsum("uc,ucd->ud", shares, tastes) + noise


def run(work: Path, sizes: tuple[tuple[int, int], ...] = ((100_000, 64), (1_000_000, 64))) -> dict[str, Any]:
    """Measure every kind on one thread; vectors and indexes stay in ``work`` and are used again.

    Returns ``rows``, one per size and kind, and provenance with the load of the machine. A row has the median and
    99th percentile of a query alone in milliseconds and the median of its processor time, which other work on the
    machine is not in; ``flat_cpu_ms`` is that of faiss's IndexFlatIP, asked in turn with the index in the same
    process, and ``ratio_to_flat`` the ratio of the two. Then milliseconds of processor time with 100 items excluded
    and of a query in batches of 64, recall at 10 and 100 on users it was not tuned on, seconds of the build, bytes on
    disk, seconds to open with nothing in the page cache, and the memory that opening and asking added: all of it, and
    what is not shared.

    Raises RuntimeError if a process fails.
    """
    load = os.getloadavg()[0]
    rows = []
    for n, d in sizes:
        folder = work / f"{n}x{d}"
        for kind in ("vectors", *KINDS):
            command = [sys.executable, "-m", "apps.recsys.bench_index", str(folder), kind, str(n), str(d)]
            if kind != "vectors":
                _process([*command, "--build"])
            measured = _process(command)
            if measured:
                rows.append(measured)
    return {"rows": rows, "provenance": provenance(faiss=faiss.__version__, load_average_1min=round(load, 2))}


def _process(command: list[str]) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=None, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} ended with {done.returncode}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _make(folder: Path, n: int, d: int) -> None:
    """Write items.npy, users.npy and truth.npy (the 100 best of every held-out user), whichever is missing."""
    names = ("items.npy", "users.npy", "truth.npy")
    if all((folder / name).exists() for name in names):
        return
    items, users = made_vectors(n, d, users=_TUNED + _HELD)
    truth = faiss.knn(users[_TUNED:], items, min(100, n), metric=faiss.METRIC_INNER_PRODUCT)[1]
    for name, array in zip(names, (items, users, truth), strict=True):
        with atomic_path(folder / name) as path:
            np.save(path, array)


def _measure(folder: Path, kind: str, build: bool) -> dict[str, Any]:
    items = np.load(folder / "items.npy", mmap_mode="r")
    users, truth = np.load(folder / "users.npy"), np.load(folder / "truth.npy")
    tuned, held = users[:_TUNED], users[_TUNED:]

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if build:
        open_index(kind, items, folder, tuned, fingerprint="made", announce=say)
        return {}
    int(items.sum() > 0)  # the map is in memory before memory is counted, as it is where a server runs
    for path in folder.glob(f"{kind}.*"):
        _forget(path)
    before = _memory()
    start = time.perf_counter()
    index = open_index(kind, items, folder, tuned, fingerprint="made")
    opened = time.perf_counter() - start
    index.search(held[:200], K)
    memory = {name: value - before[name] for name, value in _memory().items()}

    flat = faiss.IndexFlatIP(items.shape[1])
    flat.add(np.ascontiguousarray(items))
    excluded = np.random.default_rng(0).integers(0, len(items), (len(held), EXCLUDED))
    ways: list[Callable[[int], Any]] = [
        lambda row: index.search(held[row : row + 1], K),
        lambda row: flat.search(held[row : row + 1], K),
    ]
    (_, cpu), (_, flat_cpu) = _times(ways, len(held))
    wall, cpu_alone = _times(ways[:1], len(held))[0]
    filtered = _times([lambda row: search_filtered(index, held[row], K, Filter(excluded[row]))], len(held))[0][1]
    batched = _times([lambda row: index.search(held[64 * row : 64 * row + 64], K)], len(held) // 64)[0][1] / 64
    return {
        "items": len(items),
        "dimension": items.shape[1],
        "kind": kind,
        "p50_ms": _milliseconds(np.median(wall)),
        "p99_ms": _milliseconds(np.percentile(wall, 99)),
        "cpu_ms": _milliseconds(np.median(cpu_alone)),
        "flat_cpu_ms": _milliseconds(np.median(flat_cpu)),
        "ratio_to_flat": round(float(np.median(cpu) / np.median(flat_cpu)), 4),
        "filtered_cpu_ms": _milliseconds(np.median(filtered)),
        "batched_cpu_ms": _milliseconds(np.median(batched)),
        "recall_at_10": _recall(index.search(held, K)[1], truth),
        "recall_at_100": _recall(index.search(held, 100)[1], truth),
        "build_seconds": index.about["build_seconds"],
        "build_threads": index.about.get("threads"),
        "bytes": index.about["bytes"],
        "open_seconds": round(opened, 4),
        "memory_added_bytes": memory["Rss"],
        "memory_own_bytes": memory["Anonymous"],
        "parameters": index.about["parameters"],
        "tuned": {name: index.about[name] for name in ("ef_search", "nprobe", "candidates") if name in index.about},
    }


def _times(ways: list[Callable[[int], Any]], rows: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return wall and processor seconds of each way for the same rows, asked in turn, as many as fit in the time."""
    times: list[list[tuple[float, float]]] = [[] for _ in ways]
    began = time.perf_counter()
    for way in ways:
        way(0)
    for row in range(rows):
        for way, taken in zip(ways, times, strict=True):
            wall, cpu = time.perf_counter(), time.thread_time()
            way(row)
            cpu = time.thread_time() - cpu
            taken.append((time.perf_counter() - wall, cpu))
        if time.perf_counter() - began > _SCAN_SECONDS:
            break
    return [(np.array(taken)[:, 0], np.array(taken)[:, 1]) for taken in times]


def _recall(found: np.ndarray, truth: np.ndarray) -> float:
    k = min(found.shape[1], truth.shape[1])
    shares = [len(np.intersect1d(row[:k], best[:k])) / k for row, best in zip(found, truth, strict=True)]
    return round(float(np.mean(shares)), 4)


def _milliseconds(seconds: Any) -> float:
    return round(float(seconds) * 1e3, 4)


def _forget(path: Path) -> None:
    """Drop a file from the page cache, if nothing has it mapped."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _memory() -> dict[str, int]:
    """Return resident bytes of this process: all, and those that belong to no file and can be shared with nobody."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition(":")
        if name in ("Rss", "Anonymous"):
            found[name] = int(rest.split()[0]) * 1024
    return found


def main() -> None:
    """Measure or build one kind and print one JSON line; ``run`` calls this in fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=("vectors", *KINDS))
    parser.add_argument("items", type=int)
    parser.add_argument("dimension", type=int)
    parser.add_argument("--build", action="store_true")
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    if options.kind == "vectors":
        _make(options.folder, options.items, options.dimension)
        print("{}")
    else:
        print(json.dumps(_measure(options.folder, options.kind, options.build)))


def judged(value: float, target: float, *, least: bool = True, unit: str = "") -> dict[str, Any]:
    """Return a figure beside its target: at least that much, or at the most."""
    met = value >= target if least else value <= target
    return {"value": round(value, 4), "unit": unit, "target": f"{'>=' if least else '<='} {target:g}", "met": bool(met)}


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of the largest catalogue measured."""
    items = max(row["items"] for row in rows)
    by_kind = {row["kind"]: row for row in rows if row["items"] == items}
    name = f"{items:,} items, one core"
    return {
        f"exact, {name}": judged(1 / by_kind["exact"]["ratio_to_flat"], 0.95, unit="x faiss IndexFlatIP"),
        f"int8, {name}": judged(by_kind["int8"]["p50_ms"], 4.5, least=False, unit="ms a query"),
        f"int8, {name}, recall@10": judged(by_kind["int8"]["recall_at_10"], 0.99),
        f"hnsw, {name}": judged(by_kind["hnsw"]["p50_ms"], 0.4, least=False, unit="ms a query"),
        f"hnsw, {name}, recall@10": judged(by_kind["hnsw"]["recall_at_10"], 0.97),
    }


if __name__ == "__main__":
    main()
