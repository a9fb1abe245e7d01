"""The wing's benchmarks: each is one command, resumable, and writes JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcore.config import UserError
from kdcore.run import provenance, write_json

if TYPE_CHECKING:
    from apps.speech.bench_digits import Simulated


def run_bench(
    what: str, output: Path | None, work: Path, only: Sequence[str] = (), simulated: Simulated | None = None
) -> int:
    """Run one benchmark and print its result as JSON; ``output`` also takes it, atomically.

    ``only`` are the recipes of ``quality`` or the models of ``digits`` that are measured, for which ``simulated`` makes
    corpora of simulated speech.
    """
    if what not in ("quality", "digits") and only:
        raise UserError(f"--only: is for bench quality and bench digits, got bench {what}")
    if what == "digits":
        if simulated is None:
            raise ValueError("simulated: bench digits wants corpora")
        result = digits(work, simulated, only)
    else:
        result = (
            quality(work, only)
            if what == "quality"
            else {"train": train, "noise": noise, "runtime": runtime}[what](work)
        )
    command = ["kd", "speech", "bench", what, *(["--only", ",".join(only)] if only else [])]
    command += ["--json", f"benchmarks/results/{output.name}"] if output else []
    result = {**result, "benchmark": f"speech {what}", "provenance": provenance(command=command, load=os.getloadavg())}
    if output is not None:
        write_json(output, result)
    print(json.dumps(result, indent=2))
    return 0


def quality(work: Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure recipes on AN4 against the student alone and the teacher."""
    from apps.speech import bench_quality

    return bench_quality.run(work, only)


def train(work: Path) -> dict[str, Any]:
    """Measure what a taught step costs beside a plain one, and what buckets waste."""
    from apps.speech import bench_train

    return bench_train.run(work)


def digits(work: Path, simulated: Simulated, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure one student for AN4, spoken digits and simulated speech on speakers it never heard."""
    from apps.speech import bench_digits

    return bench_digits.run(work, simulated, only)


def noise(work: Path) -> dict[str, Any]:
    """Measure what a teacher that hears clean speech is worth to a student that hears noise."""
    from apps.speech import bench_noise

    return bench_noise.run(work)


def runtime(work: Path) -> dict[str, Any]:
    """Measure the exported student on the device, in the command line, in sherpa-onnx and in the service."""
    from apps.speech import bench_runtime

    return bench_runtime.run(work)
