"""What a model takes in memory: a process of its own loads it, hears one utterance, and says by how much it grew."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from apps.speech.latency import peak_memory
from kdcore.child_processes import environment


def model_memory(folder: Path, features: np.ndarray) -> int:
    """Return the bytes that a process grows by to load a stored model and hear features float32 [T, 80].

    Interpreter and torch were there before; weights, activations and what the kernels keep were not.

    Raises:
        OSError: the process failed; the text has its last line.
    """
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "features.npy"
        np.save(file, features, allow_pickle=False)
        command = [sys.executable, "-m", "apps.speech.memory", os.path.abspath(folder), os.fspath(file)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        raise OSError(f"{folder}: its memory could not be measured: {done.stderr.strip().splitlines()[-1:]}")
    return int(done.stdout)


def _status(field: str) -> int:
    """Return VmRSS (resident now) or VmHWM (at most) in bytes; where the system has neither, the peak of all time.

    The peak of ``resource`` begins with what the parent had when it started this process.
    """
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return peak_memory()
    return int(text.partition(f"{field}:")[2].split()[0]) * 1024


def _main(folder: str, features: str) -> int:
    import torch

    from apps.speech.fitting import ask
    from apps.speech.models.store import load_model

    torch.set_num_threads(1)
    heard = np.load(features, allow_pickle=False)
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
    before = _status("VmRSS")
    model, _ = load_model(folder)
    ask(model, [heard])
    print(max(0, _status("VmHWM") - before))
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
