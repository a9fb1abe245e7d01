"""The run directory: resolved configuration, provenance, metrics and log, all written atomically.

A reader of a run never sees half a file: everything is written to a temporary sibling, flushed to disk and
renamed. ``log.jsonl`` is the one file that grows; its readers ignore a torn last line.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from kdcore import processes
from kdcore.config import UserError, build, differences, dump_yaml, read_yaml, resolved
from kdcore.locks import LOCKS, beside, locked

ROLES = ("teacher", "student_alone", "student", "assistant", "baseline")


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to; rename what is there to ``path`` on success, remove it on failure.

    The file is fsynced before the rename and the folder after it, so a crash leaves the old file or the new
    one, never a part of either. What a killed writer left behind is removed by the next one of the same file. Of a
    link, what it leads to is written.

    Raises:
        UserError: ``path`` is a folder, a device or a pipe.
        OSError: it cannot be written; of a full disk the error names it.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        what = "a folder" if target.is_dir() else "a device or a pipe"
        raise UserError(f"{target}: is {what}, wanted the name of a file")
    if target.is_symlink():
        target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_orphans(target)
    folder, lock = _temporary_folder(target)
    try:
        temporary = folder / target.name
        yield temporary
        # some writers (safetensors) give their files to the owner alone: a model is for whoever may read its folder
        os.chmod(temporary, folder.stat().st_mode & 0o666)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
        flush(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None:  # writing does not say where
            raise OSError(error.errno, error.strerror, str(target)) from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _temporary_folder(target: Path) -> tuple[Path, int]:
    """Create a folder beside ``target``, under a lock that the system frees when this process dies.

    A folder, since some writers (safetensors again) have temporary files of their own beside the one they are given.
    """
    while True:
        folder = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        folder.mkdir()
        try:
            lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:  # another writer took the folder for an orphan before it was locked
            continue
        with suppress(OSError):  # a file system without locks has no orphans removed either
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / ".lock").exists():
            return folder, lock
        os.close(lock)


def remove_orphans(target: Path) -> None:
    """Remove what killed writers of ``target`` left beside it: temporary folders whose lock nobody holds."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        with suppress(OSError):  # gone by now, not ours to touch, or its writer lives
            lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write JSON atomically, indented, keys in the order given; NaN is refused (it is not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str], kind: type | None = None) -> Any:
    """Return what a JSON file holds.

    Raises:
        UserError: it is no JSON in UTF-8, or holds something else than a ``kind`` (dict or list).
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    if kind is not None and not isinstance(value, kind):
        raise UserError(f"{path}: got {type(value).__name__}, wanted {kind.__name__}")
    return value


def fingerprint(*parts: str | bytes | np.ndarray | Mapping[str, Any] | None) -> str:
    """Return 16 hex digits of a SHA-256 over the parts: text, bytes, arrays (dtype and shape count) or mappings.

    Raises TypeError for what has no content of its own to hash: arrays of objects, mappings that hold other than JSON
    values and paths.
    """
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            if part.dtype.hasobject:
                raise TypeError("fingerprint: got an array of objects, wanted numbers or fixed-width text")
            header = f"array:{part.dtype.str}:{part.shape}:".encode()
            digest.update(header)
            digest.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data if part.size else b"")
        elif isinstance(part, bytes):
            digest.update(b"bytes:%d:" % len(part))
            digest.update(part)
        else:
            text = json.dumps(part, sort_keys=True, default=_plain).encode()
            digest.update(b"json:%d:" % len(text))
            digest.update(text)
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"fingerprint: got {type(value).__name__} in a mapping, wanted JSON values")


def provenance(**extra: Any) -> dict[str, Any]:
    """Return what is needed to repeat a run: command, versions, commit, machine; ``extra`` is added as given."""
    packages = ("kdsuite", "torch", "lightning-fabric", "numpy", "scipy", "pyarrow", "implicit", "torchrec")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions,
        "commit": _git_commit(),
        "machine": {"platform": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        **extra,
    }


def _git_commit() -> str | None:
    """Return the commit of the code that runs, with ``+changes`` if the working tree differs; None outside git."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}+changes" if dirty else head


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: platform knows
    return platform.processor()


def metric_row(
    *,
    domain: str,
    recipe: str,
    model: str,
    role: str,
    seed: int,
    split: str,
    params: int,
    bytes: int,
    metrics: Mapping[str, float],
    latency_ms: Mapping[str, float] | None = None,
    train_seconds: float = 0.0,
    **extra: Any,
) -> dict[str, Any]:
    """Return one row of ``metrics.json``; ``role`` must be one of ``ROLES``."""
    if role not in ROLES:
        raise ValueError(f"role: got {role!r}, wanted one of {', '.join(ROLES)}")
    return {
        "domain": domain,
        "recipe": recipe,
        "model": model,
        "role": role,
        "seed": seed,
        "split": split,
        "params": int(params),
        "bytes": int(bytes),
        "metrics": {name: float(value) for name, value in metrics.items()},
        "latency_ms": dict(latency_ms) if latency_ms else {"p50": None, "p99": None},
        "train_seconds": round(float(train_seconds), 3),
        **extra,
    }


@dataclass(frozen=True)
class RunDirectory:
    """A folder that holds everything about one run; creating it is cheap and idempotent."""

    path: Path

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Create the folder if it is missing and return it."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder)

    @property
    def metrics(self) -> Path:
        """The file of what was measured of all models."""
        return self.path / "metrics.json"

    def refuse_other(self, config: Mapping[str, Any], kind: type | None = None) -> bool:
        """Return whether a run with this resolved configuration is here already; UserError if it is another one.

        Of ``kind``, what configurations are made of, it may lack settings that came later: they count as the defaults.
        """
        theirs = self.read_config()
        if theirs is not None and kind is not None:
            # settings that are no more are told as a difference
            with suppress(UserError):
                theirs = resolved(build(kind, theirs, "config.yaml"))
        if theirs is not None and fingerprint(theirs) != fingerprint(config):
            changed = ", ".join(differences(theirs, dict(config))[:5])
            raise UserError(f"{self.path}: holds a run with other settings ({changed}); choose another --out")
        return theirs is not None

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved configuration."""
        write_text(self.path / "config.yaml", dump_yaml(config))

    def read_config(self) -> dict[str, Any] | None:
        """Return the resolved configuration of an earlier start of this run, or None."""
        file = self.path / "config.yaml"
        return read_yaml(file) if file.exists() else None

    def write_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write all rows of ``metrics.json``."""
        write_json(self.metrics, list(rows))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the rows of ``metrics.json``, none if it is not there yet."""
        file = self.metrics
        return read_json(file, list) if file.exists() else []


def belongs(folder: Path, key: str) -> bool:
    """Return whether a folder holds a whole model of this key."""
    file = folder / "model.json"
    return file.exists() and read_json(file, dict).get("key") == key


def make_once(folder: Path, key: str, make: Callable[[], None], announce: Callable[[str], None]) -> None:
    """Call ``make``, which puts the model of a key into a folder, unless it is there; all processes must call this.

    Another command that makes it is waited for, and its model taken.
    """
    if processes.agree(belongs(folder, key)):
        return
    with processes.one_command_makes(folder, announce):
        if not processes.agree(belongs(folder, key)):
            make()


def deploy_model(source: Path, target: Path) -> None:
    """Put a copy of a model's folder into ``target``, whole or not at all; one that is there already is kept."""
    with locked(beside(target)):
        whole = (target / "model.json").exists()  # a kill may have left a part
        if whole and read_json(target / "model.json") == read_json(source / "model.json"):
            return
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(source, temporary, ignore=LOCKS)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)


def gather_logs(files: Iterable[Path], target: Path) -> None:
    """Write the events of some logs, one log after the other, as one."""
    lines = (json.dumps(event, ensure_ascii=False) + "\n" for file in files for event in read_log(file))
    write_text(target, "".join(lines))


class EventLog:
    """Appends JSON lines to ``log.jsonl``; on resume, events after the checkpoint's position are cut off.

    A resumed run therefore reads like an uninterrupted one: no epoch stands in the log twice.
    """

    def __init__(self, path: str | os.PathLike[str], context: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.context = dict(context or {})
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event with the time and this log's context; NaN and infinities, which JSON lacks, become null."""
        values = _finite({"time": round(time.time(), 3), "event": event, **self.context, **fields})
        line = json.dumps(values, ensure_ascii=False, allow_nan=False)
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(line + "\n")

    def sync(self) -> None:
        """Wait until everything written so far is on disk."""
        if self.path.exists():
            with open(self.path, "rb+") as handle:
                os.fsync(handle.fileno())

    def position(self) -> int:
        """Return the size of the log in bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def truncate(self, position: int) -> None:
        """Cut the log back to ``position`` bytes."""
        if self.position() > position:
            os.truncate(self.path, position)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return {key: _finite(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the events of a log; a last line torn by a kill is left out."""
    file = Path(path)
    if not file.exists():
        return []
    events = []
    for line in file.read_bytes().rstrip(b"\n").split(b"\n"):
        try:
            events.append(json.loads(line))
        except ValueError:  # not JSON, or cut inside a character
            break
    return events
