"""What the device's commands cost, each on one core: time, memory, and what they bring along."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from kdcore.child_processes import environment, pinned
from kdcore.config import UserError

# a process of its own that is small: the peak of a child begins with what its parent had
_LAUNCH = """
import json, os, sys, time
began = time.monotonic()
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, used = os.wait4(child, 0)
with open(int(sys.argv[1]), "w") as told:
    json.dump([began, time.monotonic(), used.ru_utime + used.ru_stime, used.ru_maxrss], told)
sys.exit(os.waitstatus_to_exitcode(status) and 1)
"""
_IMPORT = """
import sys, time
began = time.perf_counter()
from apps.speech.runtime import Recognizer
Recognizer(sys.argv[1])
print(time.perf_counter() - began)
"""


@dataclass(frozen=True)
class Ran:
    """A command that ran: what it printed, seconds until it first did and in all, of the processor, and peak memory."""

    output: str
    first_seconds: float
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def ran(words: Sequence[str]) -> Ran:
    """Run a Python command on one core and return what it cost; UserError with its last line where it fails."""
    core = sorted(os.sched_getaffinity(0))[-1:]
    told, tell = os.pipe()
    with pinned(core), open(told, encoding="utf-8") as used:
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", _LAUNCH, str(tell), sys.executable, *words],
            env={**environment(), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(tell,),
        )
        os.close(tell)
        if process.stdout is None or process.stderr is None:
            raise ValueError("process: has no pipes")
        first, first_seconds = process.stdout.read(1), time.monotonic()
        output, errors = first + process.stdout.read(), process.stderr.read()
        process.wait()
        if process.returncode:
            raise UserError(f"{' '.join(words[:5])}: {errors.decode(errors='replace').strip().splitlines()[-1:]}")
        began, ended, cpu, peak = json.load(used)
    bytes_of = 1 if sys.platform == "darwin" else 1024
    return Ran(output.decode(), first_seconds - began, ended - began, cpu, peak * bytes_of)


def transcribed(folder: Path, files: Sequence[Path], options: Sequence[str] = ()) -> tuple[list[str], dict[str, float]]:
    """Return the texts of files by ``kd speech transcribe``, in order, and what the whole command cost on one core."""
    command = ["-m", "apps.cli", "speech", "transcribe", "--model", str(folder), "--json", *options]
    done = ran([*command, *map(str, files)])
    rows = [json.loads(line) for line in done.output.splitlines()]
    audio = sum(row["duration"] for row in rows)
    return [row["text"] for row in rows], {
        "audio_seconds": audio,
        "cpu_seconds": done.cpu_seconds,
        "real_time_factor": done.cpu_seconds / audio,
        "peak_megabytes": done.peak_bytes / 1e6,
    }


def starts(folder: Path, clip: Path, repeats: int = 5) -> dict[str, float]:
    """Return medians in seconds: until a short file's first word is printed, and from the import until it could be."""
    command = ["-m", "apps.cli", "speech", "transcribe", "--model", str(folder), str(clip)]
    first = [ran(command).first_seconds for _ in range(repeats)]
    ready = [float(ran(["-c", _IMPORT, str(folder)]).output) for _ in range(repeats)]
    return {"first_word_seconds": statistics.median(first), "ready_seconds": statistics.median(ready)}


def installed(extra: str, name: str = "kdsuite") -> dict[str, Any]:
    """Return the megabytes that an extra brings into an empty environment, and those of each distribution."""
    each = {one: _bytes(one) for one in sorted(_closure(name, extra))}
    return {"megabytes": sum(each.values()) / 1e6, "distributions": {one: size / 1e6 for one, size in each.items()}}


def _closure(name: str, extra: str) -> set[str]:
    """Return the distributions a distribution asks for, with those they ask for in turn."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    waiting = [(name, extra)]
    seen = set(waiting)
    while waiting:
        one, wanted = waiting.pop()
        try:
            asked = metadata.requires(one) or []
        except metadata.PackageNotFoundError:
            continue  # for another system than this one
        for text in asked:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate({"extra": wanted}):
                continue
            key = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if key != name:
                found.add(key)
            for each in ((key, more) for more in (requirement.extras or {""})):
                if each not in seen:
                    seen.add(each)
                    waiting.append(each)
    return found


def _bytes(name: str) -> int:
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError:
        return 0
    paths = [Path(str(file.locate())) for file in files if not str(file).endswith(".pyc")]
    return sum(path.stat().st_size for path in paths if path.exists())
