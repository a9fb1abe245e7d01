"""A progress bar for long work: epochs, batches, loss terms, time left; plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_REFRESH_SECONDS = 0.2
_LINE_SECONDS = 15.0


def stderr_console() -> Console:
    """Return a console on stderr, where progress belongs (stdout is for results)."""
    return Console(file=sys.stderr)


class EpochProgress:
    """Shows the epochs of a training run; in a pipe or a log file it prints a line now and then instead."""

    def __init__(self, description: str, epochs: int, batches: int, *, start: int = 0, enabled: bool = True) -> None:
        """Take what is shown, epochs in all, batches of each, and batches done by an earlier start of this run."""
        self.description = description
        self.start = start
        self.epochs = epochs
        self.batches = max(batches, 1)
        self.console = stderr_console()
        self.live = enabled and self.console.is_terminal
        self.lines = enabled and not self.console.is_terminal
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._epoch = 0
        self._batch = 0
        self._terms: Mapping[str, float] = {}
        self._shown = 0.0
        self._line = time.monotonic()

    def __enter__(self) -> EpochProgress:
        if self.live:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[state]}", markup=False),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
                auto_refresh=False,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                self.description, completed=self.start, total=self.epochs * self.batches, state=""
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def begin_epoch(self, epoch: int, batch: int) -> None:
        """Note that an epoch begins at a batch (not the first one when resumed)."""
        self._epoch, self._batch = epoch, batch

    def advance(self, batches: int, terms: Mapping[str, float]) -> None:
        """Note finished batches and the mean of every loss term so far."""
        self._batch += batches
        self._terms = terms
        now = time.monotonic()
        if self.live and now - self._shown >= _REFRESH_SECONDS:
            self._show(now)
        elif self.lines and now - self._line >= 4 * _LINE_SECONDS:
            self._print(now, f"batch {self._batch}/{self.batches}  {_format(terms)}")

    def end_epoch(self, terms: Mapping[str, float], validation: Mapping[str, float], best: float | None) -> None:
        """Note the end of an epoch with its validation metrics and the best value so far."""
        now = time.monotonic()
        shown = _format(terms) + ("  " + _format(validation) if validation else "")
        if best is not None:
            shown += f"  best {best:.4f}"
        if self.live and now - self._shown >= _REFRESH_SECONDS:
            self._batch = self.batches
            self._show(now, shown)
        elif self.lines and now - self._line >= _LINE_SECONDS:
            self._print(now, shown)

    def _show(self, now: float, state: str | None = None) -> None:
        if self._progress is None or self._task is None:
            return
        text = state if state is not None else _format(self._terms)
        self._progress.update(
            self._task,
            completed=self._epoch * self.batches + self._batch,
            state=f"epoch {self._epoch + 1}/{self.epochs}  {text}",
        )
        self._progress.refresh()
        self._shown = now

    def _print(self, now: float, text: str) -> None:
        self.console.print(
            f"{self.description}: epoch {self._epoch + 1}/{self.epochs}  {text}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
        self._line = now


def _format(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in values.items())


class Announcer:
    """Says on stderr what is being done: each message on a line, repeated counters at most every few seconds."""

    def __init__(self) -> None:
        self.console = stderr_console()
        self._last = 0.0

    def __call__(self, text: str) -> None:
        """Print a message; ``name: done/total`` counters are thinned out."""
        now = time.monotonic()
        counter = text.rpartition(": ")[2].replace("/", "").isdigit() and "/" in text
        if counter and now - self._last < _LINE_SECONDS / 3:
            return
        self._last = now
        self.console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)
