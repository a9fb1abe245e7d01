"""Real exports and real servers for the tests of serving: an export in seconds, a server that is gone at the end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np

ROOT = Path(__file__).resolve().parents[3]
GENRES = ("Comedy", "Crime & <b>Law</b>", "Drama", "Science-Fiction", "Wäst/ern")
PER_USER = 10
# titles and ids that a careless reader of them would run, reorder or be overrun by; item and user indices
SCRIPT, IMAGE, RIGHT_TO_LEFT, LONG_TITLE, UNTITLED, LONG_ID = 0, 1, 2, 3, 4, 5
TITLES: dict[int, str | None] = {
    SCRIPT: "<script>window.ran = 1; alert('ran')</script>",
    IMAGE: '<img src="x" onerror="window.ran = 1; alert(1)"> & more',
    RIGHT_TO_LEFT: "\u202eمرحبا بالعالم (1999)",
    LONG_TITLE: "Ueberlänge" * 40,
    UNTITLED: None,
    LONG_ID: None,
    6: "Amélie — 天使愛美麗 🎬 (2001)",
}
USERS = {1: '<b onclick="window.ran=1">bold</b>', 2: "a/b?c#d&e=f %41", 3: "ü" * 240}


def item_ids(items: int) -> list[str]:
    """Return the ids of the items: ``i0``, ``i1``, ..., and one of 500 characters."""
    return ["L" * 500 if item == LONG_ID else f"i{item}" for item in range(items)]


def user_ids(users: int) -> list[str]:
    """Return the ids of the users: numbers from 100, and three that need escaping."""
    return [USERS.get(user, str(100 + user)) for user in range(users)]


def exported(
    folder: Path,
    *,
    kind: Literal["mf", "ease", "sasrec"] = "mf",
    users: int = 40,
    items: int = 60,
    bias: bool = True,
    titles: bool = True,
    features: bool = True,
    simulated: bool = False,
    integer_ids: bool = False,
    seed: int = 0,
) -> Path:
    """Write an export of a small model to ``folder / "export"`` through ``apps.recsys.export`` and return it.

    Items and users are of five genres, and vectors say which: a user's recommendations are mostly of their genre. With
    ``features`` items have ``genres`` (a list, so there are categories) and users a ``gender`` (so there are segments).
    """
    import torch

    from apps.recsys.data.dataset import load_dataset
    from apps.recsys.data.store import write_canonical
    from apps.recsys.export import export
    from apps.recsys.models.factors import MatrixFactorization
    from apps.recsys.models.linear import Ease, EaseOptions
    from apps.recsys.models.sasrec import Sasrec, SasrecOptions
    from apps.recsys.models.store import save_model
    from apps.recsys.recommend import all_histories
    from kdcore.run import write_json, write_text

    run, generator = folder / "run", np.random.default_rng(seed)
    dataset = _dataset(generator, users, items, titles=titles, features=features, integer_ids=integer_ids)
    write_canonical(dataset, run / "data")
    dataset = load_dataset(run / "data")
    model: Any
    if kind == "mf":
        vectors = [_near_genres(generator, count) for count in (users, items)]
        biases = torch.from_numpy(generator.normal(0, 0.1, items).astype(np.float32))
        model = MatrixFactorization.from_vectors(*vectors, biases if bias else None)
    elif kind == "ease":
        model = Ease.fit(all_histories(dataset), EaseOptions())
    else:
        torch.manual_seed(seed)
        model = Sasrec(users, items, SasrecOptions(dimension=8, layers=1, heads=2, length=8, scale=0.5)).eval()
    save_model(model, run / "student", epochs=1, train_seconds=0.0)
    row = {"domain": "recsys", "recipe": "relaxed_ranking", "model": model.label(), "role": "student", "seed": 0}
    write_json(run / "metrics.json", [{**row, "split": "test", "metrics": {"ndcg@10": 0.1}}])
    write_json(run / "provenance.json", {"simulated": simulated})
    write_text(run / "config.yaml", "recipe: relaxed_ranking\n")
    return export(run, "student", folder / "export")


def _near_genres(generator: np.random.Generator, count: int) -> Any:
    """Return vectors float32 [count, 5]: row r points to genre r % 5, and a little elsewhere."""
    import torch

    vectors = generator.normal(0, 0.15, (count, len(GENRES)))
    vectors[np.arange(count), np.arange(count) % len(GENRES)] += 1
    return torch.from_numpy(vectors.astype(np.float32))


def _dataset(
    generator: np.random.Generator, users: int, items: int, *, titles: bool, features: bool, integer_ids: bool
) -> Any:
    import pyarrow as pa

    from apps.recsys.data.dataset import Dataset

    had = []
    for user in range(users):
        liking = np.where(np.arange(items) % len(GENRES) == user % len(GENRES), 6.0, 1.0)
        had.append(generator.choice(items, PER_USER, replace=False, p=liking / liking.sum()))
    genres = [sorted({GENRES[item % len(GENRES)], *([GENRES[0]] if item % 7 == 0 else [])}) for item in range(items)]
    names = [TITLES.get(item, f"Film {item} ({1950 + item % 70})") for item in range(items)]
    described = {"title": pa.array(names, pa.string())} if titles else {}
    if features:
        described["genres"] = pa.array(genres, pa.list_(pa.string()))
    people = pa.table({"gender": ["FM"[user % 2] for user in range(users)]}) if features else None
    return Dataset(
        name="made-up",
        user=np.repeat(np.arange(users), PER_USER).astype(np.int32),
        item=np.concatenate(had).astype(np.int32),
        timestamp=np.arange(users * PER_USER, dtype=np.float64) + 1e9,
        rating=None,
        user_ids=pa.array(range(100, 100 + users), pa.int64()) if integer_ids else pa.array(user_ids(users)),
        item_ids=pa.array(range(items), pa.int64()) if integer_ids else pa.array(item_ids(items)),
        user_features=people,
        item_features=pa.table(described) if described else None,
        has_timestamp=True,
        dropped={},
    )


@dataclass
class Served:
    """A server that runs."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def stderr(self) -> str:
        """What it has said so far; log lines arrive within a second."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stop(self, seconds: float = 20) -> int:
        """Ask it to stop, as an operator would, and return its exit code; one that does not stop is killed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the server did not stop within {seconds:g} s:\n{self.stderr[-4000:]}") from None


@contextmanager
def running(model: Path, *words: str, seconds: float = 90) -> Iterator[Served]:
    """Run ``kd recsys serve`` on a free port of loopback until the block ends; it is ready when the block begins.

    ``words`` are further arguments. Events go to a new file unless ``--events`` is among them. A server that dies
    before it is ready, or that is dead at the end with an exit code other than 0, fails the test with what it said.
    """
    folder = Path(tempfile.mkdtemp(prefix="served-"))
    events = () if "--events" in words else ("--events", str(folder / "events.db"))
    command = [*(sys.executable, "-m", "apps.cli", "recsys", "serve", "--model", str(model), "--port", "0"), *events]
    log = folder / "stderr"
    with open(log, "wb") as handle:
        process = subprocess.Popen(
            [*command, *words],
            cwd=ROOT,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            start_new_session=True,
        )
    served = Served("", process, log)
    try:
        _wait(served, time.monotonic() + seconds)
        yield served
        if process.poll() not in (None, 0, -signal.SIGTERM):
            raise AssertionError(f"the server died with {process.returncode}:\n{served.stderr[-4000:]}")
    finally:
        _end(process)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(served: Served, until: float) -> None:
    """Find the address it announces, then wait for /readyz."""
    while time.monotonic() < until:
        if served.process.poll() is not None:
            raise AssertionError(f"the server ended with {served.process.returncode}:\n{served.stderr[-4000:]}")
        if not served.url and (found := re.search(r"serving on (http://\S+:\d+)", served.stderr)):
            served.url = found[1]
        with suppress(httpx.TransportError):
            if served.url and httpx.get(f"{served.url}/readyz", timeout=5).status_code == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"the server was not ready in time:\n{served.stderr[-4000:]}")


def _end(process: subprocess.Popen[bytes], seconds: float = 10) -> None:
    """Stop the server and whatever it has started."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
