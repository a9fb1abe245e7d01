"""How long a person waits for the page's first answer: from the click to the frame that shows it, in a real browser."""

from __future__ import annotations

import shutil
from typing import Any

# no crash reporter, no updater, nothing that talks to anybody but the service
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """Return the path of a Chromium or Chrome of this machine, None if it has none."""
    return next(filter(None, map(shutil.which, _NAMES)), None)


def first_answer(url: str, rounds: int = 20) -> dict[str, Any]:
    """Open the page afresh ``rounds`` times, click a ready user each time, and return how long the answer took.

    The page measures it, from the time stamp of the click to the first frame after the answer was put in; the time of
    the service is part of it.

    Returns:
        ``{"ms": {"p50", "max"}, "rounds": n}``, or ``{"skipped": reason}`` without playwright or a browser.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return {"skipped": "playwright is not installed"}
    browser_path = find_browser()
    if browser_path is None:
        return {"skipped": f"no browser found: none of {', '.join(_NAMES)}"}
    times = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=list(FLAGS))
        try:
            for turn in range(rounds):
                context = browser.new_context()
                page = context.new_page()
                page.goto(url)
                ready = page.locator("#ready-users button[data-user]")
                ready.first.wait_for()
                ready.nth(turn % ready.count()).click()
                results = page.locator("#results[data-first-answer-ms]")
                results.wait_for()
                times.append(float(results.get_attribute("data-first-answer-ms") or "nan"))
                context.close()
        finally:
            browser.close()
    times.sort()
    return {"ms": {"p50": times[len(times) // 2], "max": times[-1]}, "rounds": rounds}
