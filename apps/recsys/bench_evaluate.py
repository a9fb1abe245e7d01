"""How fast a full evaluation runs and how much memory it takes, on made-up factors of any size."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.recsys.data.histories import Histories
from apps.recsys.data.splits import make_split
from apps.recsys.evaluate import Evaluator
from apps.recsys.models.base import DotRecommender
from kdcore.run import provenance

SEEN_PER_USER = 20
RELEVANT_PER_USER = 5


def run(
    n_users: int = 100_000, n_items: int = 100_000, dimension: int = 64, threads: int = 2, seed: int = 0
) -> dict[str, Any]:
    """Time one full evaluation (all per-user and list-level metrics at 10) in a fresh process.

    Returns sizes, ``seconds`` (preparing the evaluator, scoring, masking, ranking and metrics; not making the data),
    ``gflop_per_s`` (2 x users x items x dimension over these seconds), ``peak_rss_bytes`` of the whole process and
    provenance with the machine and its load before the start.

    Raises RuntimeError if the process fails.
    """
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "apps.recsys.bench_evaluate"]
    for name, value in (("users", n_users), ("items", n_items), ("dimension", dimension), ("threads", threads)):
        command += [f"--{name}", str(value)]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run([*command, "--seed", str(seed)], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the benchmark process ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    return {**measured, "provenance": provenance(seed=seed, load_average_1min=round(load, 2))}


class _RandomFactors(DotRecommender):
    """Normally distributed user and item vectors."""

    kind = "random_factors"

    def __init__(self, n_users: int, n_items: int, dimension: int, generator: torch.Generator) -> None:
        super().__init__()
        self.n_users, self.n_items = n_users, n_items
        self.user = torch.nn.Parameter(torch.randn(n_users, dimension, generator=generator))
        self.item = torch.nn.Parameter(torch.randn(n_items, dimension, generator=generator))

    def user_vectors(self, users: Tensor, histories: Histories) -> Tensor:
        return self.user[users]

    def item_vectors(self) -> Tensor:
        return self.item


def _random_histories(generator: np.random.Generator, n_users: int, n_items: int, each: int) -> Histories:
    items = generator.integers(0, n_items, size=n_users * each, dtype=np.int32)
    return Histories(np.arange(n_users + 1, dtype=np.int64) * each, items, n_items)


def measure(n_users: int, n_items: int, dimension: int, threads: int, seed: int) -> dict[str, Any]:
    """Run one evaluation in this process; peak memory is that of the process since its start."""
    torch.set_num_threads(threads)
    model = _RandomFactors(n_users, n_items, dimension, torch.Generator().manual_seed(seed))
    generator = np.random.default_rng(seed)
    train = _random_histories(generator, n_users, n_items, SEEN_PER_USER)
    valid = _random_histories(generator, n_users, n_items, 1)
    test = _random_histories(generator, n_users, n_items, RELEVANT_PER_USER)
    split = make_split("synthetic", train, valid, test)
    started, cpu_started = time.perf_counter(), time.process_time()
    evaluation = Evaluator(split, "test")(model)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    operations = 2.0 * n_users * n_items * dimension
    return {
        "users": n_users,
        "items": n_items,
        "dimension": dimension,
        "threads": threads,
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "gflop_per_s": round(operations / seconds / 1e9, 2),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        "metrics": evaluation.values,
    }


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process, in bytes.

    On Linux from VmHWM: getrusage's maximum survives exec and so may be that of the process that started this one.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("users", "items", "dimension", "threads", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    given = parser.parse_args()
    print(json.dumps(measure(given.users, given.items, given.dimension, given.threads, given.seed)))


if __name__ == "__main__":
    _main()
