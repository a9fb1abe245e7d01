"""What is shown while training: on a terminal a bar that can be believed, elsewhere a line now and then."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kdcore import progress
from kdcore.progress import Announcer, EpochProgress


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def console_on(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> io.StringIO:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=200)
    monkeypatch.setattr(progress, "stderr_console", lambda: console)
    return shown


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    shown = console_on(monkeypatch, terminal=False)
    with EpochProgress("student [mf-8]", 10, 4) as bar:
        bar.begin_epoch(0, 0)
        bar.advance(1, {"bpr": 0.7})
        bar.end_epoch({"bpr": 0.6}, {"ndcg@10": 0.1}, 0.1)
        assert shown.getvalue() == "", "one line a moment would flood a log file"
        clock.now += 16
        bar.begin_epoch(1, 0)
        bar.end_epoch({"bpr": 0.5}, {"ndcg@10": 0.2}, 0.2)
        clock.now += 61
        bar.begin_epoch(2, 0)
        bar.advance(3, {"bpr": 0.4})
    assert shown.getvalue().splitlines() == [
        "student [mf-8]: epoch 2/10  bpr 0.5000  ndcg@10 0.2000  best 0.2000",
        "student [mf-8]: epoch 3/10  batch 3/4  bpr 0.4000",
    ]


def test_bar_on_a_terminal_with_terms_and_time_left(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    shown = console_on(monkeypatch, terminal=True)
    with EpochProgress("student [mf-8]", 2, 4) as bar:
        bar.begin_epoch(0, 0)
        for batch in range(4):
            clock.now += 1
            bar.advance(1, {"bpr": 0.7, "relaxed_ranking": batch / 10})
        clock.now += 1
        bar.end_epoch({"bpr": 0.6}, {"ndcg@10": 0.1}, 0.1)
        task = bar._progress.tasks[0] if bar._progress else None
        assert task is not None and (task.completed, task.total) == (4, 8)
    text = shown.getvalue()
    assert "student [mf-8]" in text
    assert "relaxed_ranking 0.3000" in text
    assert "epoch 1/2  bpr 0.6000  ndcg@10 0.1000  best 0.1000" in text


def test_a_resumed_bar_does_not_count_what_an_earlier_start_did_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A jump from 0 to where training stands would promise the end in seconds."""
    console_on(monkeypatch, terminal=True)
    with EpochProgress("x", 100, 10, start=505) as bar:
        assert bar._progress is not None
        now = [0.0]
        bar._progress.get_time = lambda: now[0]
        bar.begin_epoch(50, 5)
        for _ in range(3):
            now[0] += 1.0
            bar._shown = 0.0
            bar.advance(1, {"loss": 1.0})
        task = bar._progress.tasks[0]
        assert task.completed == 508
        assert task.speed == pytest.approx(1.0, rel=0.6)


def test_silent_when_another_process_speaks(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    for terminal in (True, False):
        shown = console_on(monkeypatch, terminal=terminal)
        with EpochProgress("x", 2, 4, enabled=False) as bar:
            bar.begin_epoch(0, 0)
            clock.now += 1000
            bar.advance(1, {"bpr": 0.7})
            bar.end_epoch({"bpr": 0.6}, {}, None)
        assert shown.getvalue() == ""


def test_announcements_thin_out_counters_only(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    shown = console_on(monkeypatch, terminal=False)
    announce = Announcer()
    clock.now += 100
    announce("reading [red]log.csv")
    for done in (1, 2, 3):
        announce(f"lists: {done}/3")
    announce("seed 0: fitting")
    clock.now += 6
    announce("lists: 3/3")
    assert shown.getvalue().splitlines() == ["reading [red]log.csv", "seed 0: fitting", "lists: 3/3"]
