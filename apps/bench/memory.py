"""Memory of the losses and of the teacher cache, each measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kdcore.teacher_cache import TeacherCache

ROWS, CLASSES = 2_000, 1_000
TOP_ROWS, TOP = 1_000_000, 100


def in_a_process(what: str) -> dict[str, Any]:
    """Run one of the measurements below in a fresh process and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled once
    command = [sys.executable, "-m", "apps.bench.memory", what]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _status(name: str) -> int:
    """Return an amount of memory of this process, in bytes, as the system counts it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}; this measurement needs Linux")


def relations() -> dict[str, Any]:
    """Return how much memory distance and angle relations need beyond their inputs, at batch 256 x 512."""
    import torch

    from kdcore.losses import angle_relations, distance_relations

    torch.set_num_threads(1)
    student, teacher = torch.randn(256, 512, requires_grad=True), torch.randn(256, 512)
    # libraries load their kernels at the first call; a batch of 8 makes them
    (distance_relations(student[:8], teacher[:8]) + angle_relations(student[:8], teacher[:8])).backward()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    before = _status("VmRSS")
    (distance_relations(student, teacher) + angle_relations(student, teacher)).backward()
    return {"extra_bytes": _status("VmHWM") - before}


def top_cache() -> dict[str, Any]:
    """Return the memory above the start of writing and reading top-100 lists of a million rows, and seconds."""
    fields = {"items": ("int32", (TOP,)), "scores": ("float16", (TOP,))}
    generator = np.random.default_rng(0)

    def compute(start: int, stop: int) -> dict[str, np.ndarray]:
        scores = generator.standard_normal((stop - start, TOP), dtype=np.float32).astype(np.float16)
        return {"items": generator.integers(0, 1 << 20, (stop - start, TOP), dtype=np.int32), "scores": scores}

    # pages of mapped files belong to the system's cache: what counts is what this process alone holds
    with tempfile.TemporaryDirectory() as folder:
        before, start = _status("RssAnon"), time.perf_counter()
        highest = before

        def watch(done: int, total: int) -> None:
            nonlocal highest
            highest = max(highest, _status("RssAnon"))

        asked = {"data": "random", "teacher": "random", "kind": f"topk-{TOP}", "n_rows": TOP_ROWS, "fields": fields}
        entry = TeacherCache(folder).get_or_compute(**asked, compute=compute, progress=watch)  # type: ignore[arg-type]
        written, total = time.perf_counter() - start, 0
        for first in range(0, TOP_ROWS, 4096):
            total += int(entry["items"][first : first + 4096].sum(dtype=np.int64))
            highest = max(highest, _status("RssAnon"))
        read = time.perf_counter() - start - written
        return {
            "above_start_bytes": highest - before,
            "bytes_on_disk": entry.nbytes,
            "write_seconds": written,
            "read_seconds": read,
            "checksum": total,
        }


def full_cache() -> dict[str, Any]:
    """Return seconds to read full scores back, and bytes, from the cache and from one file a sample (torchdistill)."""
    from torchdistill.common.file_util import load_pickle, save_pickle

    scores = np.random.default_rng(0).standard_normal((ROWS, CLASSES), dtype=np.float32)
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        entry = TeacherCache(folder / "cache").get_or_compute(
            data="random",
            teacher="random",
            kind="scores",
            n_rows=ROWS,
            fields={"scores": ("float16", (CLASSES,))},
            compute=lambda start, stop: {"scores": scores[start:stop].astype(np.float16)},
        )
        for row in range(ROWS):
            save_pickle(scores[row], str(folder / "files" / str(row)))
        order = np.random.default_rng(1).permutation(ROWS)
        batches = order.reshape(-1, 50)
        ours, theirs = [], []
        for _ in range(5):
            start = time.perf_counter()
            mine = sum(float(entry["scores"][rows].astype(np.float32).sum()) for rows in batches)
            middle = time.perf_counter()
            other = sum(
                float(np.stack([load_pickle(str(folder / "files" / str(row))) for row in rows]).sum())
                for rows in batches
            )
            ours.append(middle - start)
            theirs.append(time.perf_counter() - middle)
            if abs(mine - other) > 50:
                raise ValueError(f"the two caches do not hold the same scores: {mine} and {other}")
        size = sum(file.stat().st_size for file in (folder / "files").iterdir())
    return {"seconds": min(ours), "pickle_seconds": min(theirs), "bytes": entry.nbytes, "pickle_bytes": size}


def imports() -> dict[str, Any]:
    """Return the milliseconds that importing the losses adds to importing torch."""
    import torch  # noqa: F401  what the time is counted from

    start = time.perf_counter()
    import kdcore.losses  # noqa: F401

    return {"milliseconds": (time.perf_counter() - start) * 1e3}


MEASUREMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "relations": relations,
    "top_cache": top_cache,
    "full_cache": full_cache,
    "imports": imports,
}

if __name__ == "__main__":
    print(json.dumps(MEASUREMENTS[sys.argv[1]]()))
