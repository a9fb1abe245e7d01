"""Codistillation in the study: processes that share a folder and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.forms.networks import STUDENT, network
from benchmarks.forms.study import Study, fit
from kdcore.teaching import CodistillationStep, warm_up


def run_replicas(study: Study, count: int) -> list[float]:
    """Train replicas in processes of their own, at the same time; return their test accuracies."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    with tempfile.TemporaryDirectory() as folder:
        words = [study.data, str(study.seed), str(study.learning_rate), folder, str(count)]
        running = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.forms.replica", str(rank), *words],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(count)
        ]
        said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"a replica ended with {[process.returncode for process in running]}")
    return [float(json.loads(text.splitlines()[-1])) for text in said]


def main(rank: int, data: str, seed: int, rate: float, folder: Path, count: int) -> None:
    """Train one replica and print its test accuracy."""
    study = Study(data, seed, folder, rate)
    step = CodistillationStep(
        lambda: network(STUDENT, 1000 + seed + 77 * rank),
        study.split.train,
        folder=folder / "peers",
        rank=rank,
        peers=count,
        validate=study.validate,
        weight=warm_up(1.0, study.epochs // 2),
        learning=study.learning,
    )
    fit(step, seed, study.epochs)
    print(json.dumps(study.test(step.student)))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), Path(sys.argv[5]), int(sys.argv[6]))
