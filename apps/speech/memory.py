"""What models take in memory: a process of its own loads them, hears one utterance, and says by how much it grew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from apps.speech.latency import peak_memory
from kdcore.child_processes import environment


@dataclass(frozen=True)
class Listeners:
    """The models that are heard as one, by their folders: those stored here, and pretrained ones beside our units."""

    stored: Sequence[Path]
    pretrained: Sequence[Path] = ()
    # the folder of our units, for pretrained ones
    units: Path = Path()


def model_memory(who: Listeners, features: np.ndarray, samples: np.ndarray | None = None) -> int:
    """Return the bytes that a process grows by to load models and hear one utterance with each.

    Interpreter, torch and transformers were there before; weights, activations and what the kernels keep were not.

    Args:
        features: float32 [T, 80], which stored models hear.
        samples: float32 [n] at 16 kHz, which pretrained ones hear.

    Raises:
        OSError: the process failed; the text has its last line.
        ValueError: pretrained models without samples.
    """
    if who.pretrained and samples is None:
        raise ValueError("samples: got none, wanted those that pretrained models hear")
    with tempfile.TemporaryDirectory() as place:
        for file, values in (("features.npy", features), ("samples.npy", samples)):
            if values is not None:
                np.save(Path(place) / file, values, allow_pickle=False)
        folders = {name: [os.path.abspath(each) for each in getattr(who, name)] for name in ("stored", "pretrained")}
        given = json.dumps({**folders, "units": os.path.abspath(who.units)})
        command = [sys.executable, "-m", "apps.speech.memory", given, place]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        names = ", ".join(map(str, (*who.stored, *who.pretrained)))
        raise OSError(f"{names}: its memory could not be measured: {done.stderr.strip().splitlines()[-1:]}")
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


def _main(given: str, place: str) -> int:
    import torch

    from apps.speech.fitting import ask
    from apps.speech.models.huggingface import HuggingFaceCtc, import_transformers
    from apps.speech.models.store import load_model
    from apps.speech.units import Units

    who = json.loads(given)
    torch.set_num_threads(1)
    heard = {file.stem: np.load(file, allow_pickle=False) for file in Path(place).glob("*.npy")}
    torch.nn.functional.linear(torch.ones(8, 8), torch.ones(8, 8))
    if who["pretrained"]:
        import_transformers()
    before = _status("VmRSS")
    # all of them are held, as by who asks them together
    stored = [load_model(folder)[0] for folder in who["stored"]]
    units = Units.load(who["units"]) if who["pretrained"] else None
    others = [HuggingFaceCtc.from_folder(folder, units) for folder in who["pretrained"] if units is not None]
    for model in stored:
        ask(model, [heard["features"]])
    for other in others:
        other.log_probs(heard["samples"])
    print(max(0, _status("VmHWM") - before))
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
