"""The page in a real browser, before a real server: what it shows, what it survives, what it never does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from apps.recsys.bench_page import FLAGS, find_browser, first_answer
from tests.recsys.serve.served import GENRES, SCRIPT, TITLES, USERS, Served, item_ids, running

sync_api = pytest.importorskip("playwright.sync_api")
expect, Page, Route = sync_api.expect, sync_api.Page, sync_api.Route
BROWSER = find_browser()
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")

WAIT = 20_000
PHONE = {"width": 390, "height": 844}
READY = "#ready-users button[data-user]"
expect.set_options(timeout=WAIT)


@dataclass
class Watched:
    """A page of its own browser context, and everything it did that a page should not."""

    page: Page
    base: str
    # statuses that this test provokes: the browser logs each as an error
    expected: set[int] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)

    def open(self) -> Page:
        """Load the page; wait until it knows the model."""
        self.page.goto(self.base)
        self.page.locator(READY).first.wait_for()
        return self.page

    def on_console(self, message: Any) -> None:
        if message.type not in ("error", "warning"):
            return
        found = re.search(r"Failed to load resource.*?status of (\d+)|net::ERR_FAILED", message.text)
        if not (found and int(found[1] or 0) in self.expected):
            self.errors.append(f"console: {message.text}")

    def on_dialog(self, dialog: Any) -> None:
        self.errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Served]:
    with running(model) as served:
        yield served


Watch = Callable[..., Watched]


@pytest.fixture
def watch(browser: Any, served: Served) -> Iterator[Watch]:
    """Return what opens a watched page; at the end each is held against what no page may do."""
    opened: list[Watched] = []

    def make(url: str | None = None, expected: tuple[int, ...] = (), **options: Any) -> Watched:
        context = browser.new_context(viewport=options.pop("viewport", {"width": 1280, "height": 900}), **options)
        context.set_default_timeout(WAIT)
        watched = Watched(context.new_page(), url or served.url, set(expected))
        page = watched.page
        page.on("console", watched.on_console)
        page.on("pageerror", lambda error: watched.errors.append(f"error: {error}"))
        page.on("dialog", watched.on_dialog)
        page.on("request", lambda request: watched.addresses.append(request.url))
        opened.append(watched)
        return watched

    yield make
    for watched in opened:
        assert watched.page.evaluate("window.ran") is None
        assert watched.errors == []
        assert [each for each in watched.addresses if not each.startswith(watched.base)] == []
        watched.page.context.close()


def ask(url: str, **request: Any) -> dict[str, Any]:
    """Return what the service itself answers."""
    answer = httpx.post(f"{url}/v1/recommend", json={"k": 10, "why": True, **request}, timeout=20)
    assert answer.status_code == 200, answer.text
    return answer.json()


def names(items: list[dict[str, Any]]) -> list[str]:
    return [item.get("title") or item["item_id"] for item in items]


def shows(page: Page, answer: dict[str, Any]) -> None:
    """Assert that the page shows an answer: these items in this order, and where they come from."""
    expect(page.locator("#items .title")).to_have_text(names(answer["items"]), use_inner_text=False)
    expect(page.locator("#results")).to_have_attribute("data-source", answer["source"])


def choose(page: Page, user: str) -> None:
    page.locator("#user-input").fill(user)
    page.locator("#user-input").press("Enter")


def too_wide(page: Page) -> list[int]:
    """Return widths of page and window if the page can be scrolled sideways."""
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    return widths if widths[0] > widths[1] else []


def test_one_click_gives_an_answer_beside_the_history(watch: Watch, served: Served) -> None:
    page = watch().open()
    expect(page.locator("#empty")).to_contain_text("Pick a user")
    page.locator(READY).nth(1).click()
    user = page.locator(READY).nth(1).get_attribute("data-user")
    answer = ask(served.url, user_id=user)
    shows(page, answer)
    assert len(answer["items"]) == 10 and answer["source"] == "user"
    why = page.locator("#items li").first.locator(".why")
    expect(why).to_contain_text("near in the history: " + answer["items"][0]["why"][0]["title"])
    had = httpx.get(f"{served.url}/v1/history", params={"user_id": user}).json()["history"]
    expect(page.locator("#history-items li")).to_have_text(names(had))
    expect(page.locator("#answer-facts .time")).to_have_text(re.compile(r"^[\d.]+ ms$"))
    expect(page.locator("#facts")).to_contain_text("mf-5")
    expect(page.locator("#facts")).to_contain_text(answer["model_version"])
    expect(page.locator("#status")).to_contain_text("10 recommendations")
    expect(page.locator("#results")).to_have_attribute("data-first-answer-ms", re.compile(r"^[\d.]+$"))
    expect(page.locator(f"{READY}[aria-pressed=true]")).to_have_attribute("data-user", user)
    expect(page.locator("#simulated")).to_be_hidden()
    widths = page.locator(".track span").evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().width)")
    assert widths == sorted(widths, reverse=True) and widths[-1] > 0


def test_a_history_by_keyboard_alone(watch: Watch, served: Served) -> None:
    page = watch().open()
    page.locator("input[value=user]").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    field, options, chips = (
        page.locator("#item-input"),
        page.locator("#item-list [role=option]"),
        page.locator("#chips li"),
    )
    expect(field).to_be_focused()
    page.keyboard.type("film 2")
    expect(page.locator("#item-list")).to_have_attribute("data-query", "film 2")
    expect(field).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expect(options.nth(1)).to_have_attribute("aria-selected", "true")
    expect(field).to_have_attribute("aria-activedescendant", "item-list-1")
    chosen = options.nth(1).locator("> bdi").inner_text()
    page.keyboard.press("Enter")
    expect(chips.locator("bdi")).to_have_text([chosen])
    expect(page.locator("#item-list")).to_be_hidden()
    page.keyboard.type("i33")  # an id, typed whole
    page.keyboard.press("Enter")
    expect(chips).to_have_count(2)
    ids = [f"i{re.findall('[0-9]+', chosen)[0]}", "i33"]
    shows(page, ask(served.url, history=ids))
    page.keyboard.type("film")
    expect(options.first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#item-list")).to_be_hidden()
    page.keyboard.press("Escape")
    expect(field).to_have_value("")
    page.keyboard.press("Backspace")
    expect(chips).to_have_count(1)
    shows(page, ask(served.url, history=ids[:1]))
    page.locator("#chips button").click()
    expect(page.locator("#empty")).to_contain_text("Add what somebody had")
    expect(page.locator("#items li")).to_have_count(0)


def test_filters_count_and_newcomers(watch: Watch, served: Served) -> None:
    page = watch().open()
    page.locator("input[value=newcomer]").check()
    shows(page, ask(served.url))
    page.get_by_label("gender").select_option("F")
    shows(page, ask(served.url, segment={"gender": "F"}))
    page.get_by_label("How many").fill("3")
    page.get_by_label("How many").press("Enter")
    page.get_by_label("Category").select_option(GENRES[1])
    answer = ask(served.url, segment={"gender": "F"}, k=3, categories=[GENRES[1]])
    assert len(answer["items"]) == 3
    shows(page, answer)
    page.get_by_label("How many").fill("100")
    page.get_by_label("How many").press("Enter")
    shows(page, ask(served.url, segment={"gender": "F"}, k=100, categories=[GENRES[1]]))
    expect(page.locator("#answer-facts")).to_contain_text("there are")
    page.locator("input[value=user]").check()
    expect(page.locator("#empty")).to_contain_text("Pick a user")


def test_hostile_text_is_shown_and_nothing_of_it_runs(watch: Watch, served: Served) -> None:
    for viewport in ({"width": 1280, "height": 900}, PHONE):
        page = watch(viewport=viewport).open()
        page.get_by_label("How many").fill("60")
        for user in (USERS[1], USERS[3]):
            choose(page, user)
            expect(page.locator("#history-title bdi")).to_have_text(user, use_inner_text=False)
            shows(page, ask(served.url, user_id=user, k=60))
            assert too_wide(page) == []
        page.locator("input[value=history]").check()
        page.locator("#item-input").fill("<SCRIPT")
        option = page.locator("#item-list [role=option]")
        expect(option.locator("> bdi")).to_have_text([TITLES[SCRIPT]])
        option.click()
        for wanted in item_ids(6)[1:]:
            page.locator("#item-input").fill(wanted)
            page.locator("#item-input").press("Enter")
        expect(page.locator("#chips li")).to_have_count(6)
        shows(page, ask(served.url, history=item_ids(6), k=60))
        expect(page.locator("#history-items li").last).to_have_text(TITLES[SCRIPT])
        assert too_wide(page) == []
        assert page.locator("main script, main img, main b[onclick]").count() == 0
        page.reload()
        expect(page.locator("#chips bdi").first).to_have_text(TITLES[SCRIPT])
        page.locator(READY).first.wait_for(state="attached")


def test_a_click_is_stored_and_stays(watch: Watch, served: Served) -> None:
    watched = watch()
    page = watched.open()
    choose(page, "107")
    before = ask(served.url, user_id="107")
    shows(page, before)
    row = page.locator("#items li").nth(2)
    row.locator(".clicked").click()
    expect(page.locator(f'#items li[data-item="{before["items"][2]["item_id"]}"]')).to_have_count(0)
    after = ask(served.url, user_id="107")
    assert names(after["items"])[:9] == names(before["items"])[:2] + names(before["items"])[3:]
    shows(page, after)
    expect(page.locator("#history-items li").first).to_contain_text("clicked here")
    expect(page.locator("#status")).to_contain_text("Stored")
    page.reload()
    shows(page, after)
    expect(page.locator("#user-input")).to_have_value("107")
    page = watch().open()  # a browser that knows nothing of it
    choose(page, "107")
    shows(page, after)


def test_a_key_is_asked_for_and_events_may_be_off(watch: Watch, model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("somebody correct-horse-battery\n")
    with running(model, "--api-keys", str(tmp_path / "keys"), "--events", "none") as served:
        watched = watch(served.url, expected=(401,))
        page = watched.page
        page.goto(served.url)
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("not the right one")
        field.press("Enter")
        expect(page.locator("#key-note")).to_contain_text("without spaces")
        field.fill("wrong-key-of-enough-letters")
        field.press("Enter")
        expect(page.locator("#key-note")).to_contain_text("does not accept")
        field.fill("correct-horse-battery")
        field.press("Enter")
        page.locator(READY).first.click()
        expect(page.locator("#items li")).to_have_count(10)
        expect(page.locator("#key-form")).to_be_hidden()
        expect(page.locator("#about-list")).to_contain_text("stores no events")
        expect(page.locator(".clicked")).to_have_count(0)
        expect(page.locator("#click-note")).to_be_hidden()
        page.reload()  # the tab keeps the key
        expect(page.locator("#items li")).to_have_count(10)
        page.locator("#forget-key").click()
        expect(page.get_by_label("API key")).to_be_focused()
        assert page.evaluate("sessionStorage.getItem('kd-key')") is None
        assert not [each for each in watched.addresses if "horse" in each]


def failing(status: int, message: str) -> dict[str, Any]:
    return {"status": status, "json": {"error": {"code": "made_up", "message": message}}}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (failing(500, "the service failed"), "The service failed."),
        ({"status": 502, "body": "<h1>Bad gateway</h1>"}, "The service answered 502 without saying why."),
        ({"status": 200, "body": '{"items": ['}, "The service answered 200 without saying why."),
        (failing(503, "no answer in time"), "The service cannot answer now: no answer in time."),
        (None, "The service cannot be reached."),
    ],
    ids=["500", "no-json", "cut-off", "503", "network"],
)
def test_errors_are_said_and_can_be_tried_again(watch: Watch, served: Served, answer: Any, said: str) -> None:
    page = watch(expected=(0, 500, 502, 503)).open()
    page.route("**/v1/recommend", lambda route: route.fulfill(**answer) if answer else route.abort())
    page.locator(READY).first.click()
    expect(page.locator("#problem-text")).to_contain_text(said)
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    page.unroute("**/v1/recommend")
    page.locator("#problem-retry").click()
    expect(page.locator("#items li")).to_have_count(10)
    expect(page.locator("#problem")).to_be_hidden()


def test_too_many_requests_are_asked_again_in_time(watch: Watch, served: Served) -> None:
    page = watch(expected=(429,)).open()
    limited = {"error": {"code": "too_many_requests", "message": "more than 5 requests a second"}}
    page.route(
        "**/v1/recommend", lambda route: route.fulfill(status=429, json=limited, headers={"retry-after": "1"}), times=1
    )
    page.locator(READY).first.click()
    expect(page.locator("#problem-text")).to_contain_text("Too many requests: more than 5 requests a second.")
    expect(page.locator("#items li")).to_have_count(10)  # without another click
    expect(page.locator("#problem")).to_be_hidden()


def test_what_the_service_refuses_is_said_in_its_words(watch: Watch) -> None:
    page = watch(expected=(404,)).open()
    choose(page, "nobody")
    expect(page.locator("#problem-text")).to_have_text("Unknown user 'nobody'.")
    expect(page.locator("#problem-retry")).to_be_hidden()
    choose(page, "105")
    expect(page.locator("#items li")).to_have_count(10)
    expect(page.locator("#problem")).to_be_hidden()


def test_a_slow_answer_shows_progress_and_never_overwrites_a_newer_one(watch: Watch, served: Served) -> None:
    page = watch().open()
    held: list[Route] = []

    def hold(route: Route) -> None:
        if json.loads(route.request.post_data)["user_id"] == "110":
            held.append(route)
        else:
            route.continue_()

    page.route("**/v1/recommend", hold)
    choose(page, "110")
    expect(page.locator("#results")).to_have_attribute("aria-busy", "true")
    expect(page.locator(".progress")).to_have_css("opacity", "1")
    choose(page, "111")
    newer = ask(served.url, user_id="111")
    shows(page, newer)
    held[0].fulfill(json=ask(served.url, user_id="110"))
    page.wait_for_timeout(200)
    shows(page, newer)
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")


def test_simulated_data_and_large_ids_are_named(watch: Watch, served: Served) -> None:
    watched = watch()
    about = httpx.get(f"{served.url}/v1/model").json()
    about["data"]["simulated"] = True
    watched.page.route("**/v1/model", lambda route: route.fulfill(json=about))
    answer = {"items": [{"item_id": 2**63 - 1, "score": 1.5}], "source": "history", "request_id": "r"}
    body = json.dumps({**answer, "model_version": about["model_version"]}, separators=(",", ":"))
    watched.page.route("**/v1/recommend", lambda route: route.fulfill(body=body, content_type="application/json"))
    page = watched.open()
    expect(page.locator("#simulated")).to_have_text("simulated data")
    page.locator(READY).first.click()
    expect(page.locator("#items .title")).to_have_text(str(2**63 - 1))


# the contrast of every text with what lies under it (WCAG 2.2), and how much is wanted: text that fails
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255); };
  const luminance = (c) => c.slice(0, 3).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const under = (node) => { for (; node; node = node.parentElement) {
    const color = rgba(getComputedStyle(node).backgroundColor);
    if (color[3] > 0.99) return color; } return [1, 1, 1, 1]; };
  const bad = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.closest("noscript, option")) continue;
    const pair = [luminance(rgba(getComputedStyle(node).color)), luminance(under(node))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < 4.5) bad.push([node.className, walker.currentNode.data.slice(0, 30), ratio]);
  }
  return bad;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_the_phone_does_not_scroll_sideways(watch: Watch, scheme: str) -> None:
    page = watch(viewport=PHONE, color_scheme=scheme, expected=(404,)).open()
    assert page.evaluate(CONTRAST) == [] and too_wide(page) == []
    page.locator(READY).first.click()
    expect(page.locator("#history-items li").first).to_be_visible()
    page.locator("#about summary").click()
    page.locator("#items li").first.hover()
    assert page.evaluate(CONTRAST) == [] and too_wide(page) == []
    choose(page, "nobody")
    expect(page.locator("#problem")).to_be_visible()
    page.locator("input[value=history]").check()
    page.locator("#item-input").fill("film")
    expect(page.locator("#item-list [role=option]").first).to_be_visible()
    assert page.evaluate(CONTRAST) == [] and too_wide(page) == []


def test_the_benchmark_reads_the_first_answer(served: Served) -> None:
    with ThreadPoolExecutor(1) as pool:  # in this thread the fixture's browser has its event loop
        measured = pool.submit(first_answer, served.url, rounds=2).result()
    assert measured["rounds"] == 2 and 0 < measured["ms"]["p50"] <= measured["ms"]["max"]
