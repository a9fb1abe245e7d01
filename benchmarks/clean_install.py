"""Installs ``.[ondevice]`` into an environment of its own, exports a run and transcribes there, without torch.

    python -m benchmarks.clean_install --run runs/demo/speech

prints as JSON the megabytes that the install adds, what it brought along, and what was heard; it fails if torch came
with it, if ``kd speech check`` refuses the export, or if its clip is heard otherwise than where it was exported.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, check, transcribe; 1 and a line on stderr for what fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="a finished run of kd speech run")
    parser.add_argument("--constraint", type=Path, default=ROOT / "constraints.txt", help="versions for pip")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = measure(given.run, given.constraint, Path(folder))
        except subprocess.CalledProcessError as error:
            print(f"{' '.join(map(str, error.cmd))}: {(error.stderr or error.stdout).strip()}", file=sys.stderr)
            return 1
    print(json.dumps(found, indent=2))
    wrong = [name for name in ("without_torch", "clip_as_exported") if not found[name]]
    if wrong:
        print(f"failed: {', '.join(wrong)}", file=sys.stderr)
    return bool(wrong)


def measure(run: Path, constraint: Path, folder: Path) -> dict[str, Any]:
    """Return what ``main`` prints; a command that fails raises CalledProcessError."""
    exported, python = folder / "exported", folder / "environment" / "bin" / "python"
    _output(sys.executable, "-m", "apps.cli", "speech", "export", "--run", str(run), "--out", str(exported))
    venv.create(folder / "environment", with_pip=True)
    before = _installed(python)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
    _output(*pip, "--constraint", str(constraint), f"{ROOT}[ondevice]")
    after = _installed(python)
    kd, clip = python.with_name("kd"), exported / "self_test.wav"
    _output(str(kd), "speech", "check", str(exported))
    heard = json.loads(_output(str(kd), "speech", "transcribe", "--model", str(exported), "--json", str(clip)))
    told = json.loads((exported / "kdsuite.json").read_text(encoding="utf-8"))["self_test"]["text"]
    added = {name: round((after[name] - before.get(name, 0)) / 1e6, 1) for name in sorted(after)}
    return {
        "megabytes": round(sum(after.values()) / 1e6 - sum(before.values()) / 1e6, 1),
        "folders": {name: size for name, size in added.items() if size >= 0.5},
        "without_torch": not any(name.split("-")[0] == "torch" for name in after),
        "heard": heard["text"],
        "clip_as_exported": heard["text"] == told["model.int8.onnx"],
    }


def _installed(python: Path) -> dict[str, int]:
    """Return the bytes of everything in the environment's packages by folder, without compiled Python."""
    (site,) = python.parent.parent.glob("lib/python*/site-packages")
    sizes: dict[str, int] = {}
    for file in site.rglob("*"):
        if file.is_file() and file.suffix != ".pyc":
            name = file.relative_to(site).parts[0]
            sizes[name] = sizes.get(name, 0) + file.stat().st_size
    return sizes


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main())
